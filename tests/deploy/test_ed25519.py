"""Ed25519 in `deploy/pull.py`: RFC 8032's vectors, `cryptography`'s opinion, and everything that is malformed."""

import hashlib

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.pull import BASE, L, P, _decoded, _encoded, _sum, _times, signed

VECTORS = {  # RFC 8032, 7.1: public key, message, signature
    "test 1": (
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe246"
        "55141438e7a100b",
    ),
    "test 2": (
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aee"
        "b00d291612bb0c00",
    ),
    "test 3": (
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28d"
        "c027beceea1ec40a",
    ),
    "SHA(abc)": (
        "ec172b93ad5e563bf4932c70e1245034c35467ef2efd4d64ebf819683467e2bf",
        hashlib.sha512(b"abc").hexdigest(),
        "dc2a4459e7369633a52b1bf277839a00201009a3efbf3ecb69bea2186c26b58909351fc9ac90b3ecfdfbc7c66431e0303dca179c138ac17a"
        "d9bef1177331a704",
    ),
}
PUBLIC, MESSAGE, SIGNATURE = (bytes.fromhex(part) for part in VECTORS["test 3"])


@pytest.mark.parametrize("name", VECTORS)
def test_vectors_of_the_rfc(name: str) -> None:
    public, message, signature = (bytes.fromhex(part) for part in VECTORS[name])
    assert signed(public, message, signature)
    assert not signed(public, message + b"\0", signature)


@settings(max_examples=25, deadline=None)
@given(seed=st.binary(min_size=32, max_size=32), message=st.binary(max_size=300), bit=st.integers(0, 511))
def test_agrees_with_cryptography(seed: bytes, message: bytes, bit: int) -> None:
    """On signatures, and on those with one bit turned."""
    private = Ed25519PrivateKey.from_private_bytes(seed)
    public = private.public_key().public_bytes_raw()
    signature = private.sign(message)
    assert signed(public, message, signature)
    turned = (int.from_bytes(signature, "little") ^ 1 << bit).to_bytes(64, "little")
    with pytest.raises(InvalidSignature):
        Ed25519PublicKey.from_public_bytes(public).verify(turned, message)
    assert not signed(public, message, turned)


def test_s_beyond_the_order_is_refused() -> None:
    """S + L would verify too, and make of one signature many."""
    s = int.from_bytes(SIGNATURE[32:], "little")
    assert signed(PUBLIC, MESSAGE, SIGNATURE[:32] + s.to_bytes(32, "little"))
    assert not signed(PUBLIC, MESSAGE, SIGNATURE[:32] + (s + L).to_bytes(32, "little"))


@pytest.mark.parametrize("length", [0, 31, 33, 63, 64, 65])
def test_wrong_lengths(length: int) -> None:
    if length != 64:
        assert not signed(PUBLIC, MESSAGE, SIGNATURE.ljust(65, b"\0")[:length])
    assert not signed(PUBLIC.ljust(65, b"\0")[:length], MESSAGE, SIGNATURE)


def test_points_that_are_none() -> None:
    """A y that no point has, one not reduced, and x = 0 with the sign of an odd x."""
    assert sum(_decoded(y.to_bytes(32, "little")) is None for y in range(2, 50)) > 10
    for y, sign in ((P, 0), (P + 1, 0), (1, 1), (P - 1, 1)):
        encoded = (y | sign << 255).to_bytes(32, "little")
        assert _decoded(encoded) is None
        assert not signed(encoded, MESSAGE, SIGNATURE)
        assert not signed(PUBLIC, MESSAGE, encoded + SIGNATURE[32:])


def test_the_base_point_has_the_order() -> None:
    assert _encoded(BASE).hex() == "58" + "66" * 31
    assert _encoded(_times(L, BASE)) == (1).to_bytes(32, "little")
    assert _encoded(_sum(_times(5, BASE), _times(L - 4, BASE))) == _encoded(BASE)
