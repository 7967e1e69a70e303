"""A bucket without Amazon: moto's server as a process of its own, at an address of one's choice.

python tests/support/s3_server.py 127.0.0.1 0 sweeps      (port 0: a free one; says its address, then serves until it is ended)
"""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true"}  # fmt: skip


@contextmanager
def serving(bucket: str, *, address: str = "127.0.0.1", port: int = 0) -> Iterator[dict[str, str]]:
    """What the environment of a process must say to reach the bucket; `address` must be one of this network."""
    command = [sys.executable, __file__, address, str(port), bucket]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        assert url, f"moto's server ended: {server.wait()}"
        yield {**KEYS, "AWS_ENDPOINT_URL": url}
    finally:
        server.kill()
        server.communicate()


def main(address: str, port: str, bucket: str) -> None:
    import boto3
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # no line for each request
    server = ThreadedMotoServer(address, int(port), verbose=False)
    server.start()
    url = f"http://{address}:{server.get_host_and_port()[1]}"
    s3 = boto3.client("s3", endpoint_url=url, region_name=KEYS["AWS_DEFAULT_REGION"],
                      aws_access_key_id="testing", aws_secret_access_key="testing")  # fmt: skip
    s3.create_bucket(Bucket=bucket)
    print(url, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
