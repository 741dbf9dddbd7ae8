"""What a full cache block holds, as a name: a hash chain, so that equal names mean equal ids from the first on.

Keys and values at a position depend on every id up to there and on nothing else, so a block is named by its ids and the
name of the block before it. The first one is named after whose it is: tenants never find each other's blocks, and could
not learn from how long an answer takes what another has asked. A collision would serve one prompt with another's
content, hence a cryptographic hash (BLAKE2b, RFC 7693). It knows no blocks.
"""

from array import array
from collections.abc import Sequence
from hashlib import blake2b

NAME_BYTES = 32


def root(tenant: str, salt: str) -> bytes:
    """The name that a chain begins with. Requests with different salts share nothing either."""
    parts = (tenant.encode(errors="surrogatepass"), salt.encode(errors="surrogatepass"))
    # Lengths first: else the end of a tenant's name could pass for the beginning of a salt.
    return blake2b(b"".join(b"%d:%b" % (len(part), part) for part in parts), digest_size=NAME_BYTES).digest()


def following(name: bytes, ids: Sequence[int]) -> bytes:
    """The name of the block with these ids (below 2**32) after the one with that name."""
    return blake2b(name + array("I", ids).tobytes(), digest_size=NAME_BYTES).digest()
