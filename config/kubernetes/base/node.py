"""What scz-node needs JSON and HTTPS for; run by the node's own Python, standard library only.

`settled` and `left RESTART` read what `sczctl install --dry-run --json` says; `handlers ENGINE` looks at the node;
`label HANDLER…` gives the node the label `smm.scz/HANDLER=ready` for each of them, and takes it away for the others.
"""

import http.client
import json
import os
import ssl
import sys

HANDLERS = ("scz-runc", "scz-crun", "scz-runsc")
SCRIPTS = "/usr/local/libexec/scz-smm/containerd"
ACCOUNT = "/run/scz-node-account"
FOLDERS = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin")


def settled(plan):
    """Whether every file that would be written is there already, and nothing would be removed."""
    for path, expected in plan["files"].items():
        try:
            with open(path, encoding="utf-8") as file:
                found = file.read()
        except OSError:
            return False
        if found != expected and not (path.endswith(".json") and json.loads(found) == expected):
            return False
    return not plan["removed"]


def handlers(engine):
    """The RuntimeClasses that this node serves: containerd's by their scripts, CRI-O's by its runtimes."""
    if engine == "containerd":
        return [name for name in HANDLERS if os.access(f"{SCRIPTS}/{name}", os.X_OK)]
    return [name for name in HANDLERS if any(os.access(f"{folder}/{name[4:]}", os.X_OK) for folder in FOLDERS)]


def label(names):
    """One merge patch of this node's labels, as the pod's service account."""
    labels = {f"smm.scz/{name}": "ready" if name in names else None for name in HANDLERS}
    with open(f"{ACCOUNT}/token", encoding="ascii") as file:
        token = file.read().strip()
    context = ssl.create_default_context(cafile=f"{ACCOUNT}/ca.crt")
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], int(os.environ["KUBERNETES_SERVICE_PORT"])
    connection = http.client.HTTPSConnection(host, port, timeout=20, context=context)
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/merge-patch+json"}
    body = json.dumps({"metadata": {"labels": labels}})
    connection.request("PATCH", f"/api/v1/nodes/{os.environ['NODE_NAME']}", body, headers)
    answer = connection.getresponse()
    told = answer.read(65536)
    if answer.status != 200:
        sys.exit(f"the API server answered {answer.status}: {told[:300].decode('utf-8', 'replace')!r}")


def main(verb, words):
    """Do what the first word of the command line says."""
    if verb == "label":
        label(words)
        return 0
    if verb == "handlers":
        print(" ".join(handlers(words[0])))
        return 0
    plan = json.load(sys.stdin)
    if verb == "settled":
        return 0 if settled(plan) else 1
    print("; ".join(step for step in plan["next"] if step not in words))
    return 0


sys.exit(main(sys.argv[1], sys.argv[2:]))
