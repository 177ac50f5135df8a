"""Frames of a video: which ones, from a folder or a file, turned upright, or the reason why not."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from internvl.errors import DataError, UserError
from internvl.video import frame_indices, load_frames


def write_video(path: Path, frames: int, codec: str = "mpeg4", turn: int = 0) -> bytes:
    """Frames of one red each, 12 times its number, upper quarter green; 64x48."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        if turn:
            stream.set_display_rotation(turn)
        for number in range(frames):
            pixels = np.zeros((48, 64, 3), np.uint8)
            pixels[:, :, 0], pixels[:12, :, 1] = 12 * number, 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path.read_bytes()


def test_frames_are_the_middles_of_segments() -> None:
    """The published get_index: int(segment / 2 + round(segment * i)), segments of total - 1."""
    assert frame_indices(10, 4) == [1, 3, 5, 8]
    assert frame_indices(20, 4) == [2, 7, 12, 16]
    assert frame_indices(3, 8) == [0, 0, 0, 1, 1, 1, 2, 2]
    assert frame_indices(1, 2) == [0, 0]
    rng = np.random.default_rng(0)
    for total, number in rng.integers(1, 500, (300, 2)).tolist():
        segment = float(total - 1) / number
        published = [int(segment / 2 + np.round(segment * index)) for index in range(number)]
        assert frame_indices(total, number) == published


@pytest.mark.parametrize("name", ["a.mp4", "b.mkv", "c.avi"])
def test_a_video_file(name: str, tmp_path: Path) -> None:
    write_video(tmp_path / name, 20)
    frames = load_frames(tmp_path / name, 4)
    assert [frame.size for frame in frames] == [(64, 48)] * 4
    numbers = [np.asarray(frame)[40:, :, 0].mean() / 12 for frame in frames]
    assert np.abs(np.array(numbers) - [2, 7, 12, 16]).max() < 0.6


@pytest.mark.parametrize(("turn", "side"), [(90, "left"), (-90, "right"), (180, "bottom")])
def test_a_video_that_was_filmed_upright(turn: int, side: str, tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", 2, turn=turn)
    (frame,) = load_frames(tmp_path / "a.mp4", 1)
    green = np.asarray(frame)[..., 1]
    edges = {"left": green[:, :8], "right": green[:, -8:], "bottom": green[-8:], "top": green[:8]}
    assert max(edges, key=lambda edge: edges[edge].mean()) == side


def test_a_folder_of_frames_is_sorted_as_people_count(tmp_path: Path) -> None:
    for number in range(12):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / f"frame_{number}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    frames = load_frames(tmp_path, 12)
    assert [frame.getpixel((0, 0)) for frame in frames] == [
        (n, 0, 0) for n in frame_indices(12, 12)
    ]
    (tmp_path / "frame_11.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"frame_11\.png: empty file"):
        load_frames(tmp_path, 24)


def test_videos_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_video(tmp_path / "a.mp4", 20)
    (tmp_path / "none").mkdir()
    head = data.index(b"moov") - 4  # the header moved to the front, then the end cut off
    cases = [
        ("none", None, "no frame images in this folder"),
        ("missing.mp4", None, "no such video"),
        ("empty.mp4", b"", "corrupt or unknown video"),
        ("text.mp4", b"hello" * 99, "corrupt or unknown video"),
        ("list.mp4", b"#EXTM3U\n#EXTINF:1,\na.mp4\n", "corrupt or unknown video"),
        ("cut.mp4", data[: head - 100], "corrupt or unknown video"),
    ]
    for name, content, reason in cases:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=re.escape(str(tmp_path / name)) + f": {reason}"):
            load_frames(tmp_path / name, 4)
    write_video(tmp_path / "skew.mp4", 2, turn=30)
    with pytest.raises(DataError, match="only quarter turns"):
        load_frames(tmp_path / "skew.mp4", 1)
    with pytest.raises(UserError, match="num_frames is 0"):
        load_frames(tmp_path / "a.mp4", 0)
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(UserError, match=r"pip install 'internvl-posttraining\[video\]'"):
        load_frames(tmp_path / "a.mp4", 4)
