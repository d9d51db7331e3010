"""What keeps a page that shows what a model wrote from doing what that says? Headers that make text
of it, and the name by which its server was called.
"""

# Nothing is fetched from elsewhere, no page elsewhere frames it, and no text becomes HTML.
HEADERS = {
  'Content-Security-Policy': (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
  ),
  'X-Content-Type-Options': 'nosniff',
  'X-Frame-Options': 'DENY',
  'Referrer-Policy': 'no-referrer',
  'Cross-Origin-Opener-Policy': 'same-origin',
  'Cross-Origin-Resource-Policy': 'same-origin',
  'Cache-Control': 'no-store',
}


def without_port(host: str) -> str:
  """Of a Host header, in lower case; of an IPv6 address what is in its brackets."""
  host = host.lower()
  if host.startswith('['):
    return host[1:].partition(']')[0]
  return host.rpartition(':')[0] if ':' in host else host
