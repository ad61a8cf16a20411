"""What a SuperNode and its SuperLink agree on to measure the link between them."""

# Beside Flower's own paths; open to sites only (superlink/server.py).
PATH = "/v1/link"
# 4 MiB take half a second at 8 MB/s. Faster links use Flower's own settings, so nothing larger needs measuring, and
# what a site can ask for stays small.
MAX_PROBE_BYTES = 4 << 20
# The node config's key under which a ClientApp finds the size of its chunks.
CHUNK_BYTES = "chunk-bytes"
