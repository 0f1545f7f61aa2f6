"""The notebooks run from top to bottom in a fresh kernel of this interpreter, and what they say comes out."""

import pathlib
import sys

import nbformat
import pytest
from ipykernel.kernelspec import write_kernel_spec
from nbclient import NotebookClient

NOTEBOOKS = pathlib.Path(__file__).parent.parent / "notebooks"

# Run in the notebook's kernel after its last cell.
CLAIMS = {
    "01_forward_process": """
        assert mean_gap < 1e-6 and variance_gap < 1e-6
        assert mean_error < 0.03 and std_error < 0.02
    """,
    "02_train_ddpm": """
        assert history[-100:].mean() < 0.11
        assert jnp.allclose(terms[1:], (weight * mse)[1:], rtol=0.02)
        assert 4 < bits.total.mean() < 7
        from sklearn.datasets import load_digits
        from sklearn.neighbors import KNeighborsClassifier
        pixels, digits = load_digits(return_X_y=True)
        found = KNeighborsClassifier().fit(pixels, digits).predict((np.asarray(guided).reshape(-1, 64) + 1) * 8)
        right = (found == np.asarray(label)).reshape(len(scales), 10).mean(1)
        assert right[0] < 0.5 and right[-1] >= 0.8, right
    """,
}


def test_every_notebook_is_tested_and_stored_without_outputs():
    assert sorted(CLAIMS) == sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
    for name in CLAIMS:
        for cell in nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells:
            assert cell.cell_type == "markdown" or (cell.outputs, cell.execution_count) == ([], None)


@pytest.mark.parametrize("name", ["01_forward_process", pytest.param("02_train_ddpm", marks=pytest.mark.slow)])
def test_notebook_runs(name, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))  # nobody's start-up files
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))  # searched first
    write_kernel_spec(tmp_path / "kernels" / "python3")  # its command is sys.executable
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    lines = [f"import sys; assert sys.executable == {sys.executable!r}", *CLAIMS[name].strip().splitlines()]
    notebook.cells.append(nbformat.v4.new_code_cell("\n".join(line.strip() for line in lines)))
    NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOKS)}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []  # no warnings for the student
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 7
