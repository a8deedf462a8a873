"""The README's example in a fresh system, with the commands of the package alone and its default paths."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.fresh_root import FreshRoot, containers_conf

SUBJECT = "system:serviceaccount:shop:recommender"
TOKEN = "/var/run/secrets/scz-smm/token"
MODEL = bytes(range(251)) * 9000
DIGEST = hashlib.sha256(MODEL).hexdigest()
#: What the example needs and a minimal system has not: an engine, a software TPM, something to run.
NEEDED = ("podman", "runc", "netavark", "swtpm", "swtpm-tools", "busybox-static", "util-linux")
_TPM = """
import sys
sys.path.insert(0, "/opt")
from software_tpm import SoftwareTpm
with SoftwareTpm("/root/tpm") as tpm:
    tpm.measure_boot()
    print(tpm.tcti, *tpm.ca_certificates, flush=True)
    sys.stdin.read()
"""
_OWNER = f"""
cd /root
sczctl keygen --keys acme --name acme --no-passphrase
sczctl enroll request --owner acme/owner.json --device edge-1 -o request.json
sczctl enroll challenge request.json --keys acme --ek-roots tpm-makers -o challenge.json
sczctl enroll answer challenge.json -o answer.json
sczctl enroll accept answer.json --keys acme --ek-roots tpm-makers
mkdir out
sczctl pack ./minilm -o out/bundle --keys acme --name minilm --version 1 \
    --issuer https://edge-1.example/scz --audience scz-smm --subject {SUBJECT}
sczctl boot-policy sign --keys acme --model minilm --device edge-1 --pcr 4,7,8,9 -o out/boot-policy.json
sczctl grant minilm:1 --keys acme --device edge-1 -o out/grant.jwt
"""
_OPERATOR = """
cd /root
sczctl trust add owner acme/owner.json
sczctl token init --issuer https://edge-1.example/scz -o issuer.json
sczctl trust add issuer issuer.json
sczctl add out
sczctl install --engine podman
"""


class Story:
    """The owner, the operator and the developer, all in one system."""

    def __init__(self, root: FreshRoot) -> None:
        self.root = root

    def prepare(self) -> None:
        """What is no part of the package: an engine fit for this machine, an image, a plaintext model."""
        root = self.root
        root.apt("install", *NEEDED)
        (root / "etc/containers").mkdir(exist_ok=True)
        (root / "etc/containers/containers.conf").write_text(containers_conf())
        shutil.copy(Path(__file__).parents[1] / "software_tpm.py", root / "opt/software_tpm.py")
        (root / "root/minilm").mkdir()
        (root / "root/minilm/model.safetensors").write_bytes(MODEL)
        root.sh(
            "mkdir -p /root/image/bin /root/image/models && cp /bin/busybox /root/image/bin/ && "
            "tar -C /root/image -cf /root/image.tar . && podman import /root/image.tar localhost/application >/dev/null"
        )

    @contextmanager
    def tpm(self) -> Iterator[None]:
        """A software TPM while the block lasts; the administrator names it in the package's configuration."""
        command = [*self.root.prefix, "/usr/bin/python3", "-c", _TPM]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={"PATH": "/usr/sbin:/usr/bin"}
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            tcti, *certificates = process.stdout.readline().split()
            assert tcti, "the software TPM did not start"
            config = self.root / "etc/scz-smm/config.toml"
            config.write_text(config.read_text().replace('#tcti = "device:/dev/tpmrm0"', f'tcti = "{tcti}"'))
            self.root.sh(f"mkdir /root/tpm-makers && cp {' '.join(certificates)} /root/tpm-makers")
            try:
                yield
            finally:
                process.stdin.close()

    def tell(self) -> None:
        """From keys to a model in the store."""
        self.root.sh(_OWNER)
        self.root.sh(_OPERATOR)

    def start(self, name: str, *, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Start a container that holds the model."""
        token = f"/root/{name}.token"
        self.root.call("sczctl", "token", "issue", "--subject", SUBJECT, "-o", token)
        annotations = ["--annotation", "smm.scz/model=minilm:1", "--annotation", "smm.scz/path=/models/minilm"]
        options = ["--detach", "--name", name, *annotations, "--volume", f"{token}:{TOKEN}:ro"]
        command = ["localhost/application", "/bin/busybox", "sleep", "3600"]
        return self.root.call("podman", "run", *options, *command, check=check)

    def reads(self, name: str) -> bool:
        """Whether the container reads the whole model now."""
        path = "/models/minilm/model.safetensors"
        return self.root.call("podman", "exec", name, "/bin/busybox", "sha256sum", path).stdout.startswith(DIGEST)

    def holders(self) -> int:
        """How many containers `sczctl ps` shows."""
        return len(json.loads(self.root.call("sczctl", "ps", "--json").stdout))
