"""Hashes of files: what other programs say of the same bytes."""

from __future__ import annotations

from pathlib import Path

from graph.hashes import blake3_of, new_blake3, sha256


def test_files_have_the_hashes_that_other_programs_give_them(tmp_path: Path) -> None:
    file = tmp_path / "abc"
    file.write_bytes(b"abc")
    assert sha256(file) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert blake3_of(file) == "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"


def test_a_file_in_pieces_has_the_hash_of_the_whole(tmp_path: Path) -> None:
    file, content = tmp_path / "long", bytes(range(256)) * 12_345  # three reads, the last of them short
    file.write_bytes(content)
    whole, pieces = new_blake3(), new_blake3()
    whole.update(content)
    for at in range(0, len(content), 1000):
        pieces.update(content[at : at + 1000])
    assert blake3_of(file) == whole.hexdigest() == pieces.hexdigest()
