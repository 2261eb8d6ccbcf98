"""Who may ask: whoever knows the token, under a name of this machine, from a page of the studio itself.

A page of any other site can make the browser send requests to 127.0.0.1. It does not know the token; its requests carry its own ``Origin``;
and if it has its own name lead to 127.0.0.1, that name is in ``Host``.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field
from urllib.parse import parse_qs, unquote, urlsplit

_HOSTS = ("127.0.0.1", "localhost")
TOKEN_HEADER = "x-regraft-token"


@dataclass(frozen=True)
class Request:
    """A request of a browser.

    Attributes:
        method: ``GET`` or ``POST``.
        target: Path and query, as they were sent.
        headers: Headers by their names in lower case.
        body: What was posted.
    """

    method: str
    target: str
    headers: dict[str, str] = field(default_factory=dict[str, str])
    body: bytes = b""

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the path between its slashes, each decoded by itself: ``/runs/a%2Fb`` has two."""
        return tuple(unquote(part) for part in urlsplit(self.target).path.split("/") if part)

    def query(self, name: str) -> str:
        """Returns a value of the query, or an empty text."""
        return (parse_qs(urlsplit(self.target).query).get(name) or [""])[0]


def refusal(request: Request, token: str) -> str | None:
    """Returns why a request is refused, or None where it is answered."""
    host = request.headers.get("host", "")
    if host.rpartition(":")[0] not in _HOSTS and host not in _HOSTS:
        return "the studio answers only under 127.0.0.1 and localhost"
    origin = request.headers.get("origin")
    if origin is not None and origin != f"http://{host}":
        return "the studio answers only its own page"
    if request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        return "the studio answers only its own page"
    # What changes something needs the token in a header, which no form and no image of another page can send.
    given = request.headers.get(TOKEN_HEADER, "") or ("" if request.method == "POST" else request.query("token"))
    if not hmac.compare_digest(given.encode(), token.encode()):
        return "the token is missing or wrong; open the address that `regraft studio` has printed"
    if request.method == "POST" and request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        return "the studio is given JSON"
    return None
