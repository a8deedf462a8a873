"""Makes the manual pages: `make man` → build/man/manN/*.

The pages of `sczctl` come from click's own command tree, so that they say what `--help` says; the hand-written ones
(docs/man/*.5, *.7, *.8) get their date, version and table of exit codes filled in. All of them are mdoc (mdoc(7)).
Examples of commands: docs/man/examples/NAME.txt, sentences and, indented by four blanks, command lines.
Nothing of this machine is in the output: two builds are equal byte for byte.
"""

from __future__ import annotations

import datetime
import inspect
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from oci_hook import __version__
from oci_hook.cli import cli
from oci_hook.config import DEFAULT_CONFIG_FILE, Config
from oci_hook.key_errors import all_errors

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "docs" / "man"
GENERAL_PAGES = ("scz-smm.toml 5", "scz-smm-annotations 7", "scz-hook 8", "scz-nri 8", "scz-runtime 8")
_CODES_MARK = '.\\" EXIT CODES\n'
_EXIT_STATUS = (
    ("0", "Done."),
    ("1", "Nothing failed, but something is missing or left over, or nothing is known."),
    ("2", "Wrong usage."),
    ("10\\(en79", "An error: one line that says what failed, and one with the remedy, are on standard error."),
    ("130", "Interrupted."),
)
_BRIEF = 40
_EXPLAINED = ".Ic sczctl why Ar CODE\nand\n.Xr scz-hook 8\nexplain each number."


@dataclass(frozen=True)
class Page:
    """One command of sczctl, or sczctl itself; `names` begins with `sczctl`."""

    names: tuple[str, ...]
    command: click.Command
    context: click.Context

    @property
    def name(self) -> str:
        """The page's name: sczctl-boot-policy-sign."""
        return "-".join(self.names)

    @property
    def is_for_hosts(self) -> bool:
        """Whether the command reads the host's configuration."""
        return "config_file" in inspect.signature(self.command.callback or (lambda: None)).parameters


def pages() -> list[Page]:
    """Every command that is not hidden, groups before what is in them."""

    def walk(names: tuple[str, ...], command: click.Command, parent: click.Context | None) -> Iterator[Page]:
        context = click.Context(command, parent=parent, info_name=names[-1], **command.context_settings)
        yield Page(names, command, context)
        if isinstance(command, click.Group):
            for name in command.list_commands(context):
                found = command.get_command(context, name)
                if found is not None and not found.hidden:
                    yield from walk((*names, name), found, context)

    return list(walk(("sczctl",), cli, None))


# --- mdoc -------------------------------------------------------------------------------------------------------------


def literal(text: str) -> str:
    """A text as it stands: nothing in it is obeyed, blanks and hyphens stay what they are; ASCII."""
    text = (
        text.replace("\\", "\\e").replace("-", "\\-").replace('"', "\\(dq").replace("'", "\\(aq").replace("`", "\\(ga")
    )
    text = "".join(char if ord(char) < 128 else f"\\[u{ord(char):04X}]" for char in text)
    return f"\\&{text}" if text.startswith(".") else text


def prose(text: str) -> str:
    """Paragraphs of a help text as mdoc: one line a sentence at least; what stands in backquotes is bold."""
    text = "\n.Pp\n".join(_paragraph(part) for part in re.split(r"\n\s*\n", text.strip()))
    return text.replace(".Pp\n.Bd", ".Bd")  # a display begins with a blank line of its own


def _paragraph(text: str) -> str:
    if text.startswith("\b"):
        return f".Bd -literal -offset indent\n{_as_it_is(text.removeprefix(chr(8)).strip(chr(10)))}\n.Ed"
    lines = []
    for sentence in re.split(r"(?<=[.?!])\s+(?=[A-Z`-])", " ".join(text.split())):
        # What is in backquotes is not broken: its blanks are hidden while the lines are made.
        parts = re.split(r"`([^`]*)`", sentence)
        bold = (
            f"\\fB{literal(part).replace(' ', chr(0))}\\fP" if i % 2 else _words(part) for i, part in enumerate(parts)
        )
        for line in textwrap.wrap("".join(bold), 78, break_long_words=False, break_on_hyphens=False):
            lines.append((f"\\&{line}" if line.startswith((".", "'")) else line).replace("\0", " "))
    return "\n".join(lines)


def _words(text: str) -> str:
    """Running text: hyphens are hyphens, but for options."""
    text = text.replace("\\", "\\e")
    text = re.sub(r"(?<![\w-])--?[a-z][a-z-]*", lambda found: found[0].replace("-", "\\-"), text)
    return "".join(char if ord(char) < 128 else f"\\[u{ord(char):04X}]" for char in text)


def _as_it_is(text: str) -> str:
    return "\n".join(literal(line) if line.strip() else "" for line in text.splitlines())


def _option(option: click.Option, context: click.Context, *, brief: bool = False) -> str:
    """All spellings of an option, with its value; `brief`: without long lists of words, which adjust no line."""
    said = option.make_metavar(context)
    if brief and len(said) > _BRIEF:
        said = str(option.name).rstrip("s").upper()
    named = literal(said).replace("|", "|\\:")  # a long list of words may be broken there
    value = "" if option.is_flag or option.count else f" Ar {named}"
    spellings = [*sorted(option.opts, key=len), *option.secondary_opts]
    return " , ".join(f"Fl {literal(spelling.removeprefix('-'))}{value}" for spelling in spellings)


def option_facts(option: click.Option, context: click.Context) -> list[str]:
    """What `--help` puts into brackets behind an option's text, as sentences."""
    extra = option.get_help_extra(context)
    facts = []
    if "default" in extra:
        facts.append(f"Default: {extra['default']}.")
    if "range" in extra:
        low, high = getattr(option.type, "min", None), getattr(option.type, "max", None)
        facts.append(
            f"Range: {low} to {high}." if low is not None and high is not None else f"Range: {extra['range']}."
        )
    if "required" in extra:
        facts.append("Required.")
    if option.multiple:
        facts.append("May be repeated.")
    return facts


# --- a page of sczctl -------------------------------------------------------------------------------------------------


def command_page(page: Page, every: Sequence[Page], date: str) -> str:
    """The page of one command."""
    text = inspect.cleandoc(page.command.help or "").partition("\f")[0].strip()
    summary = " ".join(re.split(r"(?<=\.)\s", text, maxsplit=1)[0].split()).rstrip(".")
    if not summary:
        raise SystemExit(f"manual: {' '.join(page.names)} has no help text")
    if summary[1:2].islower():
        summary = summary[0].lower() + summary[1:]
    sections = [
        f".Dd {date}\n.Dt {page.name.upper()} 1\n.Os SCZ-SMM {__version__}",
        f".Sh NAME\n.Nm {page.name}\n.Nd {_words(summary)}",
        f".Sh SYNOPSIS\n{_synopsis(page)}",
        f".Sh DESCRIPTION\n{prose(text)}",
        *_commands(page, every),
        *_arguments(page),
        f".Sh OPTIONS\n{_options(page)}",
        f".Sh FILES\n{_files(page)}",
        f".Sh EXIT STATUS\n{_tagged(_EXIT_STATUS)}\n.Pp\n{_EXPLAINED}",
        *_examples(page),
        f".Sh SEE ALSO\n{_see_also(page, every)}",
    ]
    return "\n".join(sections) + "\n"


def _tagged(items: Sequence[tuple[str, str]], macro: str = "Li") -> str:
    lines = [".Bl -tag -width 10n -compact"]
    for tag, text in items:
        lines += [f".It {macro} {tag}", prose(text)]
    return "\n".join([*lines, ".El"])


def _synopsis(page: Page) -> str:
    lines = [".Nm sczctl"]
    if page.is_for_hosts and len(page.names) > 1:
        lines.append(".Op Fl \\-config Ar FILE")
    lines += [f".Cm {literal(name)}" for name in page.names[1:]]
    arguments = []
    for parameter in page.command.get_params(page.context):
        if isinstance(parameter, click.Option) and not parameter.hidden:
            spelled = _first_long(_option(parameter, page.context, brief=True).split(" , "))
            again = " Ns No ..." if parameter.multiple else ""
            lines.append(f".{spelled}{again}" if parameter.required else f".Op {spelled}{again}")
        elif isinstance(parameter, click.Argument):
            arguments.append(f".Ar {literal(parameter.make_metavar(page.context))}")
    if isinstance(page.command, click.Group):
        arguments.append(".Ar COMMAND\n.Op Ar ARGUMENTS")
    return "\n".join(lines + arguments)


def _first_long(spellings: Sequence[str]) -> str:
    """The long spelling that the command names first; others are aliases."""
    return next((each for each in spellings if each.startswith("Fl \\-")), spellings[-1])


def _commands(page: Page, every: Sequence[Page]) -> list[str]:
    inside = [other for other in every if other.names[:-1] == page.names]
    if not inside:
        return []
    lines = [".Sh COMMANDS", ".Bl -tag -width 12n"]
    for other in inside:
        lines += [f".It Xr {other.name} 1", _paragraph(other.command.get_short_help_str(limit=1000))]
    return ["\n".join([*lines, ".El"])]


def _arguments(page: Page) -> list[str]:
    lines = []
    for parameter in page.command.params:
        if isinstance(parameter, click.Argument):
            several = " May be repeated." if parameter.nargs == -1 else ""
            text = f"{'Required.' if parameter.required else 'May be left out.'}{several}"
            name = parameter.make_metavar(page.context).strip("[]").replace("]", "").removesuffix("...")
            lines += [f".It Ar {literal(name)}", prose(text)]
    return ["\n".join([".Sh ARGUMENTS", ".Bl -tag -width 10n", *lines, ".El"])] if lines else []


def _options(page: Page) -> str:
    lines = [".Bl -tag -width 10n"]
    for parameter in page.command.get_params(page.context):
        if not isinstance(parameter, click.Option) or parameter.hidden:
            continue
        text = inspect.cleandoc(parameter.help or "").strip()
        text = re.sub(r"\s*\[default: (.*)\]$", r" Default: \1.", text)  # where a default is not one value
        text += "." if text and text[-1] not in ".:" else ""
        lines += [f".It {_option(parameter, page.context)}", prose(text)]
        lines += [_paragraph(fact) for fact in option_facts(parameter, page.context)]
    return "\n".join([*lines, ".El"])


def _files(page: Page) -> str:
    default = Config()
    of_hosts = [
        (DEFAULT_CONFIG_FILE, "The host's configuration."),
        (default.store_directory, "Models, grants, boot policies, and this host's enrolment."),
        (default.trust_directory, "The owners and issuers that this host trusts."),
        (default.runtime_directory, "Records of running containers, last refusals."),
        (default.audit_file, "The audit log."),
    ]
    options = {parameter.name for parameter in page.command.params}
    rows = of_hosts if page.is_for_hosts or len(page.names) == 1 else []
    lines = [".Bl -tag -width 10n -compact"]
    for path, text in rows:
        lines += [f".It Pa {literal(path)}", text]
    if "keys" in options or len(page.names) == 1:
        text = "The owner's folder, given with `--keys`; `owner.json` in it is public, the rest is to be guarded."
        lines += [".It Ar DIRECTORY", prose(text)]
    if len(lines) == 1:
        return "None but those that are named on the command line."
    return "\n".join([*lines, ".El"])


def example_blocks(path: Path) -> list[tuple[str, bool]]:
    """The paragraphs of a file of examples, and whether each is of command lines."""
    blocks = [block.strip("\n") for block in re.split(r"\n\s*\n", path.read_text(encoding="utf-8")) if block.strip()]
    return [(textwrap.dedent(block), block.startswith("    ")) for block in blocks]


def _examples(page: Page) -> list[str]:
    path = SOURCES / "examples" / f"{page.name}.txt"
    if not path.exists():
        return []
    parts = []
    for text, is_command in example_blocks(path):
        parts.append(f".Bd -literal -offset indent\n{_as_it_is(text)}\n.Ed" if is_command else prose(text))
    return [".Sh EXAMPLES\n" + re.sub(r"(\.Ed)\n(?!\.)", r"\1\n.Pp\n", "\n".join(parts))]


def _see_also(page: Page, every: Sequence[Page]) -> str:
    near = {
        other.name
        for other in every
        if other.names[:-1] in (page.names, page.names[:-1]) or other.names == page.names[:-1]
    }
    wanted = [*sorted(f"{name} 1" for name in near - {page.name}), *GENERAL_PAGES]
    return " ,\n".join(f".Xr {name}" for name in wanted)


# --- the hand-written pages -------------------------------------------------------------------------------------------


def written_page(source: str, date: str | None) -> str:
    """A page of docs/man with the date, the version and the exit codes in their places."""
    if date is not None:
        source = re.sub(r"^\.Dd .*$", f".Dd {date}", source, count=1, flags=re.MULTILINE)
    source = re.sub(r"^\.Os.*$", f".Os SCZ-SMM {__version__}", source, count=1, flags=re.MULTILINE)
    return source.replace(_CODES_MARK, _exit_codes())


def _exit_codes() -> str:
    lines, family = [], ""
    for code, error in all_errors().items():
        if error.family != family:
            family = error.family
            lines += [*([".El"] if lines else []), f".Ss {_FAMILIES[family]}", ".Bl -tag -width 4n"]
        lines += [f".It Li {code} Em {error.__name__}", _paragraph(_sentence(error.summary))]
        lines.append(_paragraph("Remedy: " + _sentence(error.remedy, capital=False)))
    return "\n".join([*lines, ".El"]) + "\n"


_FAMILIES = {
    "input": "Input: what was given cannot be used",
    "refused": "Refused: it was checked, and it is false",
    "could-not-tell": "Could not tell: a TPM, a system call or the network gave no answer",
}


def _sentence(text: str, *, capital: bool = True) -> str:
    text = text[0].upper() + text[1:] if capital and text[1:2].islower() else text
    return text if text.endswith(".") else f"{text}."


# --- writing ----------------------------------------------------------------------------------------------------------


def release_date() -> str | None:
    """SOURCE_DATE_EPOCH's day, else that of the newest version in the changelog; None: there is neither."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    if epoch:
        day = datetime.datetime.fromtimestamp(int(epoch), datetime.UTC).date()
    else:
        found = re.search(r"^## \[[^]]+\] - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
        if found is None:
            return None
        day = datetime.date.fromisoformat(found[1])
    return f"{day:%B} {day.day}, {day.year}"


def manual() -> dict[str, str]:
    """Every page by its path below build/man."""
    date = release_date()
    written = {path.name: path.read_text(encoding="utf-8") for path in sorted(SOURCES.glob("*.[1-8]"))}
    # Before the first release: the day that the hand-written pages bear.
    of_commands = date or re.findall(r"^\.Dd (.*)$", written["scz-hook.8"], re.MULTILINE)[0]
    every = pages()
    made = {f"man1/{page.name}.1": command_page(page, every, of_commands) for page in every}
    made |= {f"man{name[-1]}/{name}": written_page(text, date) for name, text in written.items()}
    return made


def main(arguments: list[str]) -> int:
    """Write every page below the folder that is given, which is emptied first."""
    (output,) = arguments
    shutil.rmtree(output, ignore_errors=True)
    for path, text in manual().items():
        page = Path(output) / path
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(text, encoding="ascii")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
