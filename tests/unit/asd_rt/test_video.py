"""Frames to pixels, checks of --out, and writers that leave only playable videos behind."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from asd_rt import video, video_file, video_writers
from asd_rt.errors import BackendError, OutputError
from asd_rt.video import check_output, open_writer, to_uint8

RED = (200, 40, 30)


def moving_square(count: int, height: int = 64, width: int = 64) -> NDArray[np.uint8]:
    """A red square that moves two pixels a frame over dark blue: uint8 [count, height, width, 3]."""
    frames = np.full((count, height, width, 3), (14, 16, 60), dtype=np.uint8)
    for i in range(count):
        left = (2 * i) % (width - 16)
        frames[i, 8:24, left : left + 16] = RED
    return frames


def decoded(path: Path) -> list[NDArray[np.uint8]]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def leftovers(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.startswith("."))


class TestToUint8:
    def test_maps_range_and_clips(self) -> None:
        values = np.array([-2.0, -1.0, 0.0, 1.0, 3.0], dtype=np.float32)
        frames = np.broadcast_to(values, (1, 2, 3, 4, 5))
        pixels = to_uint8(frames)
        assert pixels.shape == (2, 4, 5, 3) and pixels.dtype == np.uint8
        assert pixels.flags.c_contiguous
        assert pixels[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]

    def test_keeps_channels_and_enlarges_to_squares(self) -> None:
        frames = np.random.default_rng(0).uniform(-1, 1, (1, 3, 3, 4, 6)).astype(np.float32)
        small, large = to_uint8(frames), to_uint8(frames, scale=3)
        assert large.shape == (3, 12, 18, 3)
        np.testing.assert_array_equal(large[:, 1::3, 2::3], small)
        expected = np.rint((frames[0, 1, 2] + 1) * 127.5)
        np.testing.assert_array_equal(small[1, :, :, 2], expected.astype(np.uint8))

    def test_refuses_batches_and_nan(self) -> None:
        with pytest.raises(BackendError, match=r"\[1, F, 3, H, W\], found \[2, 1, 3, 4, 4\]"):
            to_uint8(np.zeros((2, 1, 3, 4, 4), dtype=np.float32))
        broken = np.zeros((1, 1, 3, 4, 4), dtype=np.float32)
        for value in (np.nan, np.inf, -np.inf):
            broken[0, 0, 0, 1, 1] = value
            with pytest.raises(BackendError, match="not finite"):
                to_uint8(broken)


class TestCheckOutput:
    @pytest.mark.parametrize("name", ["a.mp4", "a.MP4", "a.gif", "frames", "frames/", "a b.mp4"])
    def test_accepts(self, tmp_path: Path, name: str) -> None:
        check_output(f"{tmp_path}/{name}")
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("no/such/a.mp4", "does not exist; make it: mkdir -p"),
            ("a.avi", "unknown kind of video '.avi'"),
            ("file/a.mp4", "is not a folder"),
            ("folder.mp4", "exists and is not a file"),
            ("file", "exists and is not a folder"),
            ("mixed", r"holds other things than frames of an earlier run \(notes.txt\)"),
        ],
    )
    def test_refuses(self, tmp_path: Path, name: str, message: str) -> None:
        (tmp_path / "file").write_text("x")
        (tmp_path / "folder.mp4").mkdir()
        (tmp_path / "mixed").mkdir()
        (tmp_path / "mixed" / "notes.txt").write_text("mine")
        with pytest.raises(OutputError, match=message) as caught:
            check_output(tmp_path / name)
        assert "\n" not in str(caught.value)

    def test_refuses_empty_name(self) -> None:
        with pytest.raises(OutputError, match="--out is empty"):
            check_output("")

    @pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT])
    def test_says_why_a_folder_cannot_be_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
    ) -> None:
        def refuse(self: Path, data: bytes) -> int:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(Path, "write_bytes", refuse)
        with pytest.raises(OutputError, match=os.strerror(code)):
            check_output(tmp_path / "a.mp4")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write into read-only folders")
    def test_refuses_read_only_folder(self, tmp_path: Path) -> None:
        folder = tmp_path / "locked"
        folder.mkdir(mode=0o555)
        with pytest.raises(OutputError, match="Permission denied"):
            check_output(folder / "a.mp4")

    def test_refuses_a_terminal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        with pytest.raises(OutputError, match="into the terminal; pipe it"):
            check_output("-")


class TestWhole:
    @pytest.mark.parametrize("suffix", [".mp4", ".gif"])
    def test_streams_a_playable_file(self, tmp_path: Path, suffix: str) -> None:
        path, frames = tmp_path / f"a{suffix}", moving_square(40)
        with open_writer(path, 16) as writer:
            for start in range(0, 40, 9):
                assert not path.exists()
                writer.write(frames[start : start + 9])
        assert writer.frames_written == 40
        back = decoded(path)
        assert len(back) == 40
        error = np.abs(np.stack(back).astype(int) - frames)
        assert error.mean() < 2.5
        assert leftovers(tmp_path) == []

    def test_mp4_plays_at_its_rate_and_has_its_index_first(self, tmp_path: Path) -> None:
        path = tmp_path / "a.mp4"
        with open_writer(path, 16) as writer:
            writer.write(moving_square(32))
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert stream.average_rate == 16
            assert stream.codec_context.name == "h264"
            assert stream.codec_context.pix_fmt == "yuv420p"
            assert container.duration == 2_000_000
        data = path.read_bytes()
        assert data.index(b"moov") < data.index(b"mdat")

    def test_gif_repeats_for_ever_and_keeps_colours(self, tmp_path: Path) -> None:
        path = tmp_path / "a.gif"
        frames = moving_square(4)
        with open_writer(path, 16) as writer:
            writer.write(frames)
        assert b"NETSCAPE2.0\x03\x01\x00\x00" in path.read_bytes()
        np.testing.assert_allclose(decoded(path)[2], frames[2], atol=3)

    def test_pads_odd_sizes(self, tmp_path: Path) -> None:
        with open_writer(tmp_path / "a.mp4", 16) as writer:
            writer.write(moving_square(3, 33, 47))
        assert decoded(tmp_path / "a.mp4")[0].shape == (34, 48, 3)

    def test_replaces_an_old_file_only_at_the_end(self, tmp_path: Path) -> None:
        path = tmp_path / "a.mp4"
        path.write_bytes(b"old")
        with open_writer(path, 16) as writer:
            writer.write(moving_square(2))
            assert path.read_bytes() == b"old"
        assert len(decoded(path)) == 2

    def test_one_frame_and_fractional_rate(self, tmp_path: Path) -> None:
        with open_writer(tmp_path / "a.mp4", 24000 / 1001) as writer:
            writer.write(moving_square(1))
        with av.open(str(tmp_path / "a.mp4")) as container:
            assert str(container.streams.video[0].average_rate) == "24000/1001"

    def test_folder_of_png_is_lossless_and_replaces_earlier_frames(self, tmp_path: Path) -> None:
        folder = tmp_path / "frames"
        for count in (5, 3):
            frames = moving_square(count)
            with open_writer(folder, 16) as writer:
                writer.write(frames)
            names = sorted(os.listdir(folder))
            assert names == [f"frame_{i:06d}.png" for i in range(count)]
            for name, frame in zip(names, frames, strict=True):
                np.testing.assert_array_equal(decoded(folder / name)[0], frame)
        assert leftovers(tmp_path) == []

    def test_follows_links(self, tmp_path: Path) -> None:
        (tmp_path / "link.mp4").symlink_to(tmp_path / "real.mp4")
        with open_writer(tmp_path / "link.mp4", 16) as writer:
            writer.write(moving_square(2))
        assert (tmp_path / "link.mp4").is_symlink()
        assert len(decoded(tmp_path / "real.mp4")) == 2


class TestCutShort:
    @pytest.mark.parametrize("name", ["a.mp4", "a.gif", "frames"])
    def test_interrupted_video_is_kept(
        self, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = tmp_path / name
        with pytest.raises(KeyboardInterrupt), open_writer(path, 16) as writer:
            writer.write(moving_square(21))
            raise KeyboardInterrupt
        count = len(os.listdir(path)) if path.is_dir() else len(decoded(path))
        assert count == 21
        assert "its first 21 frames are kept" in caplog.text
        assert leftovers(tmp_path) == []

    @pytest.mark.parametrize("name", ["a.mp4", "a.gif", "frames"])
    def test_nothing_stays_without_frames(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(KeyboardInterrupt), open_writer(tmp_path / name, 16):
            raise KeyboardInterrupt
        with (
            pytest.raises(OutputError, match="no frame was written"),
            open_writer(tmp_path / name, 16),
        ):
            pass
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize("suffix", [".mp4", ".gif"])
    def test_full_disk_keeps_the_playable_part(
        self, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        limit_disk(monkeypatch, 30_000)
        path = tmp_path / f"a{suffix}"
        noise = np.random.default_rng(0).integers(0, 255, (96, 32, 32, 3), dtype=np.uint8)
        with pytest.raises(OutputError, match="No space left on device") as caught:
            write_all(path, noise)
        kept = len(decoded(path))
        assert f"its first {kept} frames are kept and can be played" in str(caught.value)
        assert 0 < kept < 96
        assert path.stat().st_size <= 30_000
        if suffix == ".gif":
            with Image.open(path) as picture:
                assert picture.n_frames == kept
        assert leftovers(tmp_path) == []

    @pytest.mark.parametrize("suffix", [".mp4", ".gif"])
    def test_disk_full_from_the_start_leaves_nothing(
        self, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        limit_disk(monkeypatch, 10)
        with pytest.raises(OutputError, match="nothing of it was kept"):
            write_all(tmp_path / f"a{suffix}", moving_square(40))
        assert os.listdir(tmp_path) == []

    def test_full_disk_in_a_folder_keeps_whole_frames(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_bytes = Path.write_bytes

        def fill_up(self: Path, data: bytes) -> int:
            if self.name == "frame_000003.png":
                write_bytes(self, data[:20])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write_bytes(self, data)

        monkeypatch.setattr(Path, "write_bytes", fill_up)
        with pytest.raises(OutputError, match="its first 3 frames are kept"):
            write_all(tmp_path / "frames", moving_square(6))
        assert len(os.listdir(tmp_path / "frames")) == 3

    def test_index_stays_last_without_space_for_a_copy(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(path: Path) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(video_file, "_copy_index_first", refuse)
        write_all(tmp_path / "a.mp4", moving_square(20))
        assert len(decoded(tmp_path / "a.mp4")) == 20
        assert leftovers(tmp_path) == []


class TestPipe:
    SCRIPT = (
        "import numpy as np, sys\n"
        "from asd_rt.video import open_writer\n"
        "from asd_rt.errors import OutputError\n"
        "frames = np.full((int(sys.argv[1]), 33, 47, 3), (200, 40, 30), np.uint8)\n"
        "try:\n"
        "    with open_writer('-', 16) as writer:\n"
        "        writer.write(frames)\n"
        "except OutputError as error:\n"
        "    sys.exit(f'error: {error}')\n"
    )

    def test_is_valid_y4m(self) -> None:
        made = subprocess.run(
            [sys.executable, "-c", self.SCRIPT, "5"], capture_output=True, check=True
        )
        assert made.stderr == b""
        header, _, rest = made.stdout.partition(b"\n")
        assert header == b"YUV4MPEG2 W47 H33 F16:1 Ip A1:1 C444 XCOLORRANGE=LIMITED"
        assert len(rest) == 5 * (len(b"FRAME\n") + 3 * 33 * 47)
        with av.open(io.BytesIO(made.stdout), format="yuv4mpegpipe") as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert len(frames) == 5
        np.testing.assert_allclose(frames[4][16, 20], RED, atol=3)

    def test_reader_that_goes_is_one_line(self) -> None:
        with subprocess.Popen(
            [sys.executable, "-c", self.SCRIPT, "5000"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            assert process.stdout is not None and process.stderr is not None
            process.stdout.read(1000)
            process.stdout.close()
            message = process.stderr.read().decode()
        assert process.returncode == 1
        assert message.startswith("error: stdout: its reader has gone after ")
        assert message.count("\n") == 1


def write_all(path: Path, frames: NDArray[np.uint8]) -> None:
    with open_writer(path, 16) as writer:
        for frame in frames:
            writer.write(frame[None])


def limit_disk(monkeypatch: pytest.MonkeyPatch, limit_bytes: int) -> None:
    """Make the file under a writer as small as a full disk would."""

    class SmallDisk(io.FileIO):
        def write(self, data: bytes) -> int:  # type: ignore[override]
            room = limit_bytes - self.tell()
            if room <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data[:room])

    monkeypatch.setattr(video_file, "open_raw", lambda path: SmallDisk(path, "wb"))


def test_importing_loads_no_encoder() -> None:
    code = "import sys, asd_rt.video; sys.exit('av' in sys.modules or 'PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert video.FRAME_NAME == video_writers.FRAME_NAME
