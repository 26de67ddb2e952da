"""The fast reader of tar headers lists the same files as the standard library."""

import io
import tarfile

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from ldm_smd.data.tar_headers import tar_members

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def write(path, members, kind=tarfile.USTAR_FORMAT, **options):
    with tarfile.open(path, "w", format=kind, **options) as tar:
        for name, data, header_type in members:
            member = tarfile.TarInfo(name)
            member.size, member.type = len(data), header_type
            tar.addfile(member, io.BytesIO(data))
    return path


def listed_by_tarfile(path):
    with tarfile.open(path, "r:") as tar:
        return [(member.name, member.offset_data, member.size) for member in tar if member.isreg()]


names = st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=60).filter(
    lambda name: name not in (".", "..")
)
paths = st.lists(names, min_size=1, max_size=6).map("/".join)
types = st.sampled_from([tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE])
members = st.lists(st.tuples(paths, st.binary(max_size=1500), types), max_size=8)


def not_mistaken_for_a_folder(name, kind):
    """Return REGTYPE for a file of the oldest type whose name does not fit into the header. If the header cuts it behind a
    slash, tarfile takes the file for a folder (github.com/python/cpython/issues/141707). Our reader looks at the whole name."""
    return tarfile.REGTYPE if kind == tarfile.AREGTYPE and len(name.encode()) > tarfile.LENGTH_NAME else kind


@hypothesis_settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(members, st.sampled_from(FORMATS[1:]))
def test_any_tar_gives_the_members_of_tarfile(tmp_path, members, tar_format):
    members = [
        (name, data if kind in tarfile.REGULAR_TYPES else b"", not_mistaken_for_a_folder(name, kind))
        for name, data, kind in members
    ]
    path = write(tmp_path / "any.tar", members, tar_format)
    assert [tuple(each) for each in tar_members(path)] == listed_by_tarfile(path)


@pytest.mark.parametrize("tar_format", FORMATS[1:])
def test_a_long_name_cut_behind_a_slash_is_still_a_file(tmp_path, tar_format):
    name = f"{'f' * (tarfile.LENGTH_NAME - 1)}/image.png"
    path = write(tmp_path / "a.tar", [(name, b"data", tarfile.AREGTYPE)], tar_format)
    assert [(each.name, each.size) for each in tar_members(path)] == [(name, 4)]


def test_ustar_prefixes_and_large_numbers(tmp_path):
    name = f"{'folder/' * 20}{'n' * 90}.png"
    path = write(tmp_path / "a.tar", [(name, b"data", tarfile.REGTYPE)])
    assert [tuple(each) for each in tar_members(path)] == [(name, 512, 4)]
    header = bytearray(path.read_bytes())
    header[124:136] = b"\x80" + (4).to_bytes(11, "big")  # the size in base 256
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:512])
    path.write_bytes(header)
    assert [tuple(each) for each in tar_members(path)] == listed_by_tarfile(path) == [(name, 512, 4)]


def test_tars_with_global_headers_are_left_to_tarfile(tmp_path):
    path = write(tmp_path / "a.tar", [("a.png", b"data", tarfile.REGTYPE)], tarfile.PAX_FORMAT, pax_headers={"path": "b.png"})
    assert [tuple(each) for each in tar_members(path)] == listed_by_tarfile(path)


@pytest.mark.parametrize("position", [0, 100, 130, 150, 300])
def test_a_damaged_header_is_refused(tmp_path, position):
    """tarfile would stop there without an error, so the images after it would be lost."""
    path = write(tmp_path / "a.tar", [(f"{each}.png", b"data", tarfile.REGTYPE) for each in "abc"])
    data = bytearray(path.read_bytes())
    data[2 * 512 + position] ^= 0x41
    path.write_bytes(data)
    with pytest.raises(tarfile.ReadError):
        tar_members(path)


def test_a_truncated_tar_is_refused_but_final_zeros_may_be_missing(tmp_path):
    path = write(tmp_path / "a.tar", [(f"{each}.png", b"d" * 700, tarfile.REGTYPE) for each in "abc"])
    data, members = path.read_bytes(), tar_members(path)
    for size in range(0, 3 * 3 * 512, 128):
        path.write_bytes(data[:size])
        if size in (3 * 512, 6 * 512):  # between two members, nothing shows that another is missing
            assert tar_members(path) == members[: size // 3 // 512]
        else:
            with pytest.raises(tarfile.ReadError):
                tar_members(path)
    path.write_bytes(data[: 9 * 512])
    assert tar_members(path) == members


def test_other_files_are_refused(tmp_path):
    for content in (b"", b"no tar", b"no tar" * 1000, b"\x1f\x8b" + b"0" * 2000):
        (tmp_path / "a.tar").write_bytes(content)
        with pytest.raises(tarfile.ReadError):
            tar_members(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(bytes(10240))
    assert tar_members(tmp_path / "a.tar") == []
