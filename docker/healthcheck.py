"""Tell Docker whether the gateway in this container is ready: exit status 0 if it is, else 1 and the reason."""

import http.client
import os
import sys

SECONDS = 3


def fault(port: int) -> str | None:
    """Say why the gateway on this port of this machine is not ready; None if it is."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    try:
        connection.request("GET", "/v2/health/ready")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return f"The gateway gave no answer on port {port}: {error}"
    finally:
        connection.close()
    return None if status == 200 else f"The gateway is not ready: it answered {status}."


if __name__ == "__main__":
    sys.exit(fault(int(os.environ["PORTCULLIS_PORT"])))
