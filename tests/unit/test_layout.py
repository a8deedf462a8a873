"""`bundle.layout`: the vectors of whole bundles, and what a hostile folder can do."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oci_hook import errors
from oci_hook.bundle import image
from oci_hook.bundle.image import (
    CODE_TYPE,
    DOC_TYPE,
    WEIGHT_CONFIG_TYPE,
    WEIGHT_TYPE,
    Descriptor,
    Layer,
    image_manifest_document,
    index_document,
    layer_media_type,
    parse_image_manifest,
    parse_index,
)
from oci_hook.bundle.layout import LayoutWriter, open_layout, verify_bundle, verify_digests
from oci_hook.bundle.manifest import parse_manifest, verify_manifest
from oci_hook.bundle.segments import ContentKey
from oci_hook.documents import canonical
from oci_hook.errors import BundleInvalid, BundleMismatch, OutputExists, SczError, SourceInvalid
from oci_hook.trust import parse_owner
from tests.bundles import (
    FIELDS,
    FILES,
    MODEL,
    blob_path,
    digest_of,
    load_vectors,
    make_owner,
    pack_files,
    read_bundle,
    value_or_none,
    write_source,
    write_table,
)
from tests.vectors.bundle import generate

VECTORS = load_vectors("layout")


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("name", VECTORS)
def test_vector(name: str, tmp_path: Path) -> None:
    vector = VECTORS[name]
    folder = write_table(tmp_path / "bundle", vector["bundle"])
    owner, key = parse_owner(canonical(vector["owner"])), ContentKey(bytes.fromhex(vector["content_key"]))
    before = open_descriptors()
    if vector["expect"] is None:
        manifest, files = read_bundle(folder, owner, key)
        assert files == FILES
        assert (manifest.model, dict(manifest.fields)) == (MODEL, FIELDS)
    else:
        with pytest.raises(SczError) as refused:
            read_bundle(folder, owner, key)
        assert type(refused.value) is getattr(errors, vector["expect"])
    assert open_descriptors() == before


def test_every_change_has_its_vector() -> None:
    """The folder is what the generator makes: nothing stale, nothing missing."""
    made = {name: vector["expect"] for name, vector in generate.layout_vectors()}
    assert made == {name: vector["expect"] for name, vector in VECTORS.items()}


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write_table(tmp_path / "bundle", VECTORS["layout-good"]["bundle"])


def test_what_a_layout_tells(good: Path) -> None:
    with open_layout(good) as layout:
        index = json.loads((good / "index.json").read_bytes())
        assert layout.image_digest == index["manifests"][0]["digest"]
        assert layout.version_tag == "v1"
        assert layout.manifest_digest == digest_of(layout.config_blob)
        assert [layer.path for layer in layout.layers] == sorted(FILES)
        assert [layer.media_type for layer in layout.layers] == [DOC_TYPE, WEIGHT_CONFIG_TYPE, WEIGHT_TYPE]
        descriptor = layout.open_blob(layout.layers[0].digest)
    try:
        assert not os.get_inheritable(descriptor)
        assert digest_of(os.read(descriptor, 1 << 20)) == layout.layers[0].digest
    finally:
        os.close(descriptor)


def test_a_layout_by_descriptor_leaves_it_open(good: Path) -> None:
    directory = os.open(good, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with open_layout(directory) as layout:
            assert layout.version_tag == "v1"
        assert "index.json" in os.listdir(directory)
    finally:
        os.close(directory)


def test_only_named_blobs_are_opened(good: Path) -> None:
    with open_layout(good) as layout:
        for digest in ("sha256:" + 64 * "0", "sha256:../../index.json", "", "../../index.json"):
            with pytest.raises(BundleInvalid):
                layout.open_blob(digest)


def test_a_folder_named_through_a_link(good: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(good)
    with open_layout(tmp_path / "link") as layout:
        assert layout.version_tag == "v1"


def test_no_bundle_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for name in ("missing", "file", "empty"):
        with pytest.raises(BundleInvalid):
            open_layout(tmp_path / name)


def test_a_device_is_not_opened(good: Path) -> None:
    """A character device, as an image's layer can carry one."""
    (good / "index.json").unlink()
    os.mknod(good / "index.json", 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero
    with pytest.raises(BundleInvalid, match="regular file"):
        open_layout(good)


def test_a_layer_that_grows_is_not_followed(good: Path) -> None:
    vector = VECTORS["layout-good"]
    with open_layout(good) as layout:
        manifest = verify_manifest(parse_manifest(layout.config_blob), parse_owner(canonical(vector["owner"])))
        verify_bundle(layout, manifest)
        layer = layout.layers[2]
        seen: list[int] = []

        def grow(done: int) -> None:
            seen.append(done)
            with (good / blob_path(layer.digest)).open("ab") as file:
                file.write(bytes(1000))

        with pytest.raises(BundleMismatch):
            verify_digests(layout, manifest, grow)
        assert seen[-1] <= sum(each.size for each in layout.layers)


def test_another_manifest_s_layers_are_refused(good: Path) -> None:
    """Everything agrees, but it is not this bundle's own manifest that was verified."""
    owner = parse_owner(canonical(VECTORS["layout-good"]["owner"]))
    with open_layout(good) as layout:
        manifest = verify_manifest(parse_manifest(layout.config_blob), owner)
        with pytest.raises(BundleMismatch):
            verify_bundle(layout, replace(manifest, digest="sha256:" + 64 * "0"))


def test_progress_counts_to_the_end(good: Path) -> None:
    seen: list[int] = []
    with open_layout(good) as layout:
        manifest = verify_manifest(
            parse_manifest(layout.config_blob), parse_owner(canonical(VECTORS["layout-good"]["owner"]))
        )
        verify_digests(layout, manifest, seen.append)
        assert seen == sorted(seen)
        assert seen[-1] == sum(layer.size for layer in layout.layers)


def test_ten_thousand_layers_and_one_more() -> None:
    layer = Layer("sha256:" + 64 * "0", 56, "a", WEIGHT_TYPE)
    config = Descriptor("sha256:" + 64 * "1", 10)
    assert len(parse_image_manifest(image_manifest_document(config, [layer] * 10_000))[1]) == 10_000
    with pytest.raises(BundleInvalid):
        parse_image_manifest(image_manifest_document(config, [layer] * 10_001))


def test_documents_are_read_as_written() -> None:
    descriptor = Descriptor("sha256:" + 64 * "a", 123)
    assert parse_index(index_document(descriptor, "v1")) == (descriptor, "v1")
    layers = (Layer("sha256:" + 64 * "b", 57, "a/b", CODE_TYPE),)
    assert parse_image_manifest(image_manifest_document(descriptor, layers)) == (descriptor, layers)


@pytest.mark.parametrize(
    ("path", "media_type"),
    [
        *(
            (f"x/model.{suffix}", WEIGHT_TYPE)
            for suffix in ["safetensors", "bin", "gguf", "onnx", "pt", "pth", "h5", "npz"]
        ),
        *((f"x/config.{suffix}", WEIGHT_CONFIG_TYPE) for suffix in ["json", "yaml", "toml", "txt", "JSON"]),
        ("README.md", DOC_TYPE),
        ("x/LICENSE", DOC_TYPE),
        ("LICENSE.txt", DOC_TYPE),
        ("license", DOC_TYPE),
        ("modeling.py", CODE_TYPE),
        ("no-suffix", WEIGHT_TYPE),
        (".json", WEIGHT_TYPE),
        ("license.safetensors", WEIGHT_TYPE),
    ],
)
def test_media_types(path: str, media_type: str) -> None:
    assert layer_media_type(path) == media_type
    assert media_type in image.LAYER_TYPES


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    assert value_or_none(lambda: parse_index(data), BundleInvalid) is None
    assert value_or_none(lambda: parse_image_manifest(data), BundleInvalid) is None


VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["mediaType", "digest", "size", "annotations", "manifests", "layers", "config"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@given(VALUE, st.sampled_from(["manifests", "schemaVersion", "mediaType", "annotations"]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
def test_any_index(good: Path, value: object, part: str) -> None:
    index = json.loads(index_document(Descriptor("sha256:" + 64 * "a", 1), "v1"))
    (good / "index.json").write_text(json.dumps({**index, part: value}))
    assert value_or_none(lambda: open_layout(good).close(), BundleInvalid) is None


# --- the writer -------------------------------------------------------------------------------------------------------


def test_a_layout_appears_whole(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with LayoutWriter(output) as writer:
        (partial,) = tmp_path.iterdir()
        assert partial.name.startswith(".out.partial-")
        assert partial.stat().st_mode & 0o777 == 0o700
        blob = writer.add_blob(b"layer")
        config = writer.add_blob(b"config")
        assert not (partial / "index.json").exists()
        writer.commit(config, [Layer(blob.digest, blob.size, "a", WEIGHT_TYPE)], "v1")
    assert list(tmp_path.iterdir()) == [output]
    with open_layout(output) as layout:
        assert layout.config_blob == b"config"


def test_an_uncommitted_layout_is_removed(tmp_path: Path) -> None:
    with LayoutWriter(tmp_path / "out") as writer:
        writer.add_blob(b"layer")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_nothing_is_overwritten(tmp_path: Path, kind: str) -> None:
    output = tmp_path / "out"
    makers: dict[str, Callable[[], object]] = {
        "file": lambda: output.write_bytes(b""),
        "folder": output.mkdir,
        "link": lambda: output.symlink_to("nowhere"),
    }
    make = makers[kind]
    make()
    with pytest.raises(OutputExists), LayoutWriter(output):
        pass
    assert list(tmp_path.iterdir()) == [output]
    (output.rmdir if kind == "folder" else output.unlink)()
    with pytest.raises(OutputExists), LayoutWriter(output) as writer:
        config = writer.add_blob(b"config")
        make()  # somebody is faster
        writer.commit(config, [], "v1")
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("kind", ["file", "full folder"])
def test_the_kernel_refuses_to_overwrite(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody is faster than the last look: rename(2) itself says no."""
    output = tmp_path / "out"
    with pytest.raises(OutputExists), LayoutWriter(output) as writer:
        config = writer.add_blob(b"config")
        write_source(tmp_path, {"out" if kind == "file" else "out/file": b"theirs"})
        monkeypatch.setattr(os.path, "lexists", lambda path: False)
        writer.commit(config, [], "v1")
    assert list(tmp_path.iterdir()) == [output]
    assert (output if kind == "file" else output / "file").read_bytes() == b"theirs"


def test_a_writer_is_used_once(tmp_path: Path) -> None:
    with LayoutWriter(tmp_path / "out") as writer:
        writer.commit(writer.add_blob(b"config"), [], "v1")
        with pytest.raises(RuntimeError):
            writer.add_blob(b"late")
    with pytest.raises(RuntimeError):
        LayoutWriter(tmp_path / "other").add_blob(b"early")


def test_an_image_manifest_over_its_limit_is_not_written(tmp_path: Path) -> None:
    layer = Layer("sha256:" + 64 * "0", 56, "/".join(["x" * 200] * 5), WEIGHT_TYPE)
    with pytest.raises(SourceInvalid, match="image manifest"), LayoutWriter(tmp_path / "out") as writer:
        writer.commit(writer.add_blob(b"config"), [layer] * 10_000, "v1")
    assert list(tmp_path.iterdir()) == []


def test_a_packed_bundle_is_an_oci_layout(tmp_path: Path) -> None:
    keys = make_owner()
    source = write_source(tmp_path / "source", FILES)
    packed = pack_files(keys, ContentKey(os.urandom(32)), source, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "index.json").read_bytes())
    (descriptor,) = index["manifests"]
    assert set(descriptor) == {"mediaType", "digest", "size", "annotations"}
    assert descriptor["digest"] == packed.image_digest
    document = json.loads((tmp_path / "out" / blob_path(packed.image_digest)).read_bytes())
    assert document["artifactType"] == "application/vnd.scz-smm.model.v1"
    assert document["config"]["mediaType"] == "application/vnd.scz-smm.manifest.v1+jwt"
    for path in (tmp_path / "out" / "blobs" / "sha256").iterdir():
        assert digest_of(path.read_bytes()) == "sha256:" + path.name
