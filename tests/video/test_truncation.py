"""Files that are cut off say so, whole ones say nothing."""

import re

import av
import numpy as np
import pytest
from tests.inference.films import cut, moving_square, read, read_until_broken, write_film, write_live


def test_the_last_frame_of_matroska_may_be_long(tmp_path):
    path = tmp_path / "film.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        packets = [
            packet
            for frame in [*moving_square(3), None]
            for packet in stream.encode(None if frame is None else av.VideoFrame.from_ndarray(frame, format="rgb24"))
        ]
        packets[-1].duration = int(5 / packets[-1].time_base)
        container.mux(packets)
    with av.open(str(path)) as container:
        assert container.streams.video[0].metadata["DURATION"] > "00:00:05"
    assert len(read(path)) == 3


def test_a_film_without_frames_cannot_be_read(tmp_path):
    path = write_film(tmp_path / "film.mp4", moving_square(6))
    with av.open(str(path)) as container:
        begin = min(entry.pos for entry in container.streams.video[0].index_entries)
    path.write_bytes(path.read_bytes()[:begin])
    with pytest.raises(ValueError, match=r"film\.mp4: no frame can be decoded; the file is cut off, 6 of its frames"):
        read(path)


@pytest.mark.parametrize("beyond", [0, 40])
def test_what_there_is_of_a_film_that_is_cut_off_is_read_first(tmp_path, beyond):
    """Also when it is cut between two frames."""
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 255, (48, 64, 3), dtype=np.uint8) for _ in range(12)]
    path = write_film(tmp_path / "film.mp4", frames, options={"bf": "0"})
    with av.open(str(path)) as container:
        entry = container.streams.video[0].index_entries[6]
    path.write_bytes(path.read_bytes()[: entry.pos + entry.size + beyond])
    count, message = read_until_broken(path)
    assert count in (7, 8)  # FFmpeg may make a frame of a piece of one
    assert re.search(rf"film\.mp4: the file is cut off.*; {count} frames could be decoded", message)


def noise(count=24):
    """Frames of which each takes some kilobytes in every codec."""
    return list(np.random.default_rng(0).integers(0, 255, (count, 48, 64, 3), dtype=np.uint8))


FILES = {  # whose containers say how long they are
    "film.mkv": "libx264",
    "film.webm": "libvpx",
    "film.mp4": "libx264",
    "film.avi": "libx264",
    "film.wmv": "wmv2",
    "film.gif": "gif",
}
LIVE = {  # name: container, codec, the muxer's options
    "live.mkv": ("matroska", "libx264", {"live": "1"}),
    "live.webm": ("webm", "libvpx", {}),
    "live.mp4": ("mp4", "libx264", {"movflags": "frag_every_frame+empty_moov"}),
    "live.ts": ("mpegts", "libx264", {}),
    "live.flv": ("flv", "flv1", {"flvflags": "no_duration_filesize"}),
    "live.avi": ("avi", "libx264", {}),
    "live.wmv": ("asf", "wmv2", {}),
    "live.nut": ("nut", "libx264", {}),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A sound film of every kind."""
    folder, frames = tmp_path_factory.mktemp("films"), noise()
    for name, codec in FILES.items():
        write_film(folder / name, frames, codec, "rgb8" if codec == "gif" else "yuv420p")
    for name, (container, codec, options) in LIVE.items():
        write_live(folder / name, frames, container, codec, **options)
    return folder


@pytest.mark.parametrize("name", [*FILES, *LIVE])
def test_whole_films_of_every_container_pass_without_complaint(library, name):
    assert len(read(library / name)) == 24


@pytest.mark.parametrize("share", [0.5, 0.8, 0.97])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_cut_off_anywhere_says_so_after_what_is_there(library, tmp_path, name, share):
    path = tmp_path / name
    path.write_bytes((library / name).read_bytes())
    count, message = read_until_broken(cut(path, share))
    assert 24 * (share - 0.25) < count <= 24
    assert f"{count} frames could be decoded" in message
    assert re.search("the file is cut off|cannot be read as an image", message)


@pytest.mark.parametrize("name", ["live.mkv", "live.webm", "live.mp4", "live.ts", "live.flv", "live.nut"])
def test_a_recording_that_is_cut_off_within_a_frame_says_so(library, tmp_path, name):
    with av.open(str(library / name)) as film:
        packet = [packet for packet in film.demux(video=0) if packet.size][12]
        end = packet.pos + packet.size // 2 // 188 * 188  # a transport stream is then cut between two packets
    (tmp_path / name).write_bytes((library / name).read_bytes()[:end])
    count, message = read_until_broken(tmp_path / name)
    assert 8 <= count <= 13
    assert re.search("the file is cut off|damaged|not there", message)


def test_a_recording_of_clusters_without_sizes_says_so_too(library, tmp_path):
    """As browsers record."""
    content = bytearray((library / "live.mkv").read_bytes())
    clusters = [found.end() for found in re.finditer(rb"\x1f\x43\xb6\x75", content)]
    for at in clusters:
        width = 9 - content[at].bit_length()
        content[at : at + width] = bytes([0xFF >> (width - 1)]) + (width - 1) * b"\xff"
    assert clusters
    path = tmp_path / "film.mkv"
    path.write_bytes(content)
    assert len(read(path)) == 24
    count, message = read_until_broken(cut(path, 0.6))
    assert 8 <= count <= 20
    assert "the file is cut off" in message


@pytest.mark.parametrize("name", ["live.ts", "live.flv"])
def test_a_recording_that_stops_between_two_frames_is_a_whole_one(library, tmp_path, name):
    with av.open(str(library / name)) as film:
        packets = [packet for packet in film.demux(video=0) if packet.size]
    (tmp_path / name).write_bytes((library / name).read_bytes()[: packets[12].pos])
    assert len(read(tmp_path / name)) == 12


@pytest.mark.parametrize("name", ["film.mkv", "live.mkv", "film.mp4", "film.avi", "film.gif", "live.flv", "live.ts"])
@pytest.mark.parametrize("rest", [bytes(1000), b"more of something else" * 50])
def test_what_follows_a_whole_film_is_no_part_of_it(library, tmp_path, name, rest):
    (tmp_path / name).write_bytes((library / name).read_bytes() + rest)
    assert len(read(tmp_path / name)) == 24


def test_a_film_that_lacks_less_than_a_second_says_so(tmp_path):
    path = cut(write_film(tmp_path / "film.mkv", moving_square(20), "mjpeg", "yuvj420p"), 0.8)
    count, message = read_until_broken(path)
    assert count == 16
    assert "the file is cut off" in message
