"""The headers that every response has, for browsers. A page that needs a wider policy sets its own."""


def content_policy(*directives: str) -> str:
    """Return a Content-Security-Policy that permits only `directives` and forbids other pages to frame this one."""
    return "; ".join(("default-src 'none'", *directives, "base-uri 'none'", "frame-ancestors 'none'"))


SECURITY_HEADERS = {
    "Content-Security-Policy": content_policy("form-action 'none'"),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",  # for browsers that do not know frame-ancestors
}
HTTPS_HEADERS = {"Strict-Transport-Security": "max-age=31536000"}
