"""The page at `/`: one file, no external resources, a policy that lets nothing else in."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources

from fastapi import APIRouter
from starlette.responses import Response

router = APIRouter()


def _load_page() -> bytes:
    return (resources.files("lockstep.server") / "static" / "index.html").read_bytes()


def content_security_policy(page: bytes) -> str:
    """Allows exactly the page's own inline style and script, by their hashes, and requests to this server."""
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hash_of(page, b'script')}",
            f"style-src {_hash_of(page, b'style')}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )


def _hash_of(page: bytes, tag: bytes) -> str:
    body = re.search(rb"<%b>(.*?)</%b>" % (tag, tag), page, re.DOTALL)
    if body is None:
        raise ValueError(f"the page has no <{tag.decode()}> element without attributes")
    return f"'sha256-{base64.b64encode(hashlib.sha256(body[1]).digest()).decode()}'"


@router.get("/")
async def page() -> Response:
    """Chat, and live figures of the engine."""
    content = _load_page()
    headers = {
        "Content-Security-Policy": content_security_policy(content),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return Response(content, headers=headers, media_type="text/html; charset=utf-8")
