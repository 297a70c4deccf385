import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from d2o.cli.export import export
from d2o.errors import UserError
from tests.helpers import tiny_student

app = typer.Typer()
app.command()(export)


@pytest.fixture
def student(tmp_path):
    tiny_student(tmp_path / "s.safetensors")
    return tmp_path / "s.safetensors"


def test_the_result_names_the_file_the_card_the_difference_and_the_licence(student):
    result = CliRunner().invoke(app, [str(student), "--format", "safetensors", "--dtype", "fp16", "--check-n", "5"])
    assert result.exit_code == 0, result.output
    target = student.with_name("s-fp16.safetensors")
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"wrote {target} (0.1 MB)")
    assert lines[1] == f"card {target}.md"
    assert lines[2].startswith("parity: max abs difference ")
    assert "at batch size 1 and 5" in lines[2]
    assert lines[3] == "licence: CC0-1.0 (teacher: tiny)"
    assert target.exists()
    again = CliRunner().invoke(app, [str(student), "--format", "safetensors", "--dtype", "fp16"])
    assert again.stdout.startswith("unchanged ")


def test_mistakes_reach_the_command_line_as_user_errors(student):
    result = CliRunner().invoke(app, [str(student), "--format", "onnxx"])
    assert isinstance(result.exception, UserError)
    assert "did you mean 'onnx'" in str(result.exception)
    assert CliRunner().invoke(app, [str(student), "--check-n", "0"]).exit_code == 2


def test_help_explains_every_option_without_torch():
    code = "import sys, typer; from d2o.cli.export import export; app = typer.Typer(); app.command()(export)\n"
    code += "try: app(['--help'])\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for option in ("--format", "--out", "--opset", "--dtype", "--check-n", "--tolerance", "--force"):
        assert option in done.stdout
