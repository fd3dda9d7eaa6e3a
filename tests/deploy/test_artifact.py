import pytest

from hybrid_jax.deploy import artifact


def test_reads_what_it_wrote(tmp_path):
    path = tmp_path / "new" / "model"
    manifest = artifact.write(path, b"abc", {"kind": "test"})
    # sha256 of 'abc', from FIPS 180-2.
    want = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert manifest == {"kind": "test", "bytes": 3, "sha256": want}
    assert artifact.read(path) == (b"abc", manifest)
    assert sorted(file.name for file in path.parent.iterdir()) == ["model", "model.json"]


@pytest.mark.parametrize("data", [b"", b"ab", b"abd", b"abcd"])
def test_refuses_what_was_changed(tmp_path, data):
    artifact.write(tmp_path / "model", b"abc", {})
    (tmp_path / "model").write_bytes(data)
    with pytest.raises(ValueError, match=r"model must have (bytes|sha256) .*, got .*damaged"):
        artifact.read(tmp_path / "model")


@pytest.mark.parametrize("text", ["", "[]", "{}", "3", '{"bytes": 3}', "\xff"])
def test_refuses_a_bad_manifest(tmp_path, text):
    artifact.write(tmp_path / "model", b"abc", {})
    (tmp_path / "model.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"model.json must be a JSON object with bytes and sha256"):
        artifact.read(tmp_path / "model")


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="model"):
        artifact.read(tmp_path / "model")
    (tmp_path / "model").write_bytes(b"abc")
    with pytest.raises(FileNotFoundError, match=r"model\.json"):
        artifact.read(tmp_path / "model")
