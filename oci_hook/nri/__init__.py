"""scz-nri: a plugin of the Node Resource Interface, by which containerd and CRI-O let a program change containers.

`schema` (protobuf), `ttrpc` and `mux` (frames), `messages` (what is said) and `encoding` (its bytes), `handler` (what a
plugin does), `calls` and `lanes` (which of it when), `connection` (registers, serves). docs/nri.md specifies the wire.
"""
