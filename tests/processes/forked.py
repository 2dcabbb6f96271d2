"""The program that stands for `svdserve` in tests; see zygote.listening.

Without any import that takes time: ``forked.py SOCKET WORD...``.
"""

import json
import os
import signal
import socket
import sys
from types import FrameType


def main() -> None:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(sys.argv[1])

    def relay(number: int, _: FrameType | None) -> None:
        connection.sendall(bytes([number]))

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, relay)
    request = json.dumps([sys.argv[2:], os.getcwd(), dict(os.environ)]) + "\n"
    socket.send_fds(connection, [request.encode()], [0, 1, 2])
    answer = b""
    while part := connection.recv(100):
        answer += part
    code = int(answer or b"1")
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


main()
