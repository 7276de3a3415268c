import shutil
import subprocess
import sys

from PIL import Image

from dcngen import cli


def test_data_command_prepares_counts_and_draws(image_folder, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    arguments = [
        "data",
        str(image_folder),
        "--image-size",
        "8",
        "--cache-dir",
        str(tmp_path / "c"),
        "--out",
        str(sheet),
    ]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "cat" in out and "8 pictures" in out and "4 pictures (held-out)" in out and str(sheet) in out
    assert Image.open(sheet).size[1] == 2 * (96 + 28 + 4)


def test_a_class_that_is_not_held_out_counts_none(image_folder, tmp_path, capsys):
    shutil.rmtree(image_folder / "test" / "dog")
    assert cli.main(["data", str(image_folder), "--image-size", "8", "--cache-dir", str(tmp_path / "c")]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines() if "dog" in line] == [["dog", "3", "0"]]


def test_user_errors_are_one_line_not_a_traceback(tmp_path, capsys):
    assert cli.main(["data", str(tmp_path / "absent")]) == 1
    assert "is not a folder here" in capsys.readouterr().err


def test_unknown_command_suggests_the_nearest(capsys):
    assert cli.main(["compere"]) == 2
    assert "did you mean 'compare'" in capsys.readouterr().err


def test_help_imports_no_torch():
    code = "import sys; from dcngen.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "compare" in result.stdout
