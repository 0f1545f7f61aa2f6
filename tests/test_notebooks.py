"""The notebooks run from top to bottom in a fresh kernel of this interpreter, and what they say comes out."""

import pathlib
import sys
import textwrap

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
    "03_inception_score_and_fid": """
        assert accuracy > 0.95
        assert abs(by_divergence - by_entropies) < 1e-9 and 8 < by_divergence < 10
        assert abs(by_library - by_formula) < 1e-12 and abs(by_moving - by_formula) < 0.1
        assert fid(drawn) < fid(features) and precision_of_drawn < 0.5 < precision_of_digits
        found = {damage: {s: np.array([row[s] for row in rows]) for s in rows[0]} for damage, rows in scores.items()}
        grows = lambda values: (np.diff(values) > 0).all()
        assert all(grows(found[d]["FID"]) and grows(-found[d]["IS"]) for d in ("blur", "noise", "classes")), found
        lost, few = found["classes"], found["distinct images"]
        assert np.ptp(lost["precision"]) < 0.05 and grows(-lost["recall"]) and lost["recall"][-1] < 0.3, lost
        assert few["recall"][2] == 0 and few["IS"][2] > 0.9 * few["IS"][0] and few["precision"].min() > 0.85, few
        real_ones, ten_images, copied = cheat_scores.values()
        assert ten_images["IS"] > 9.9 and ten_images["recall"] < 0.1 and ten_images["FID"] > 3 * real_ones["FID"]
        assert abs(copied["FID"]) < 1e-9 and copied["precision"] == copied["recall"] == 1
        assert -1.15 < slope < -0.85 and (np.abs(mean_kid) < 4 * kid_error).all(), (slope, mean_kid, kid_error)
        assert np.ptp(infinite.mean(1)[1:]) < 0.5 * np.ptp(plain.mean(1)[1:])
    """,
    "04_variational_bound": """
        assert missed[0] > 10 and abs(missed[1]) < 0.1 and abs(gaps["prior", 1][-1]) < 0.05, gaps
        assert np.abs(elbo_errors).max() < 5 and jnp.abs(weights_at_posterior - exact).max() < 1e-3
        assert all((np.diff(found) > -1e-3).all() for found in tighter.values()), tighter
        gap = {width: float(exact.mean() - found[-1]) for width, found in tighter.items()}
        assert gap[0.5] > 0.5 > gap[2.0] > gap[1.4] > -0.05, gap
        assert abs(kl_error) < 4 and all(np.abs(error).max() < 5 for error in gradient_errors.values())
        plain, helped, reparameterised = total_variance.values()
        assert plain > 10 * helped > 50 * reparameterised, total_variance
        assert results["ELBO"][2] > linear_log_p and all(found[3] > found[2] for found in results.values())
        used = {name: (found[4] > 0.1).sum() for name, found in results.items()}
        assert used["beta = 4"] < used["ELBO"] < used["free bits 0.5"] == 16, used
        assert results["free bits 0.5"][0] > results["ELBO"][0] > results["beta = 4"][0]
        assert bits["VAE trained on levels"][0] < 4 < bits["VAE trained on densities"][0] < bits["linear VAE"][0], bits
        from scipy import stats
        edges = stats.norm(m, s).cdf(np.r_[-np.inf, np.arange(255) / 127.5 - 1 + 1 / 255, np.inf])
        by_scipy = -np.log2(np.diff(edges))[np.round((np.asarray(x0) + 1) * 127.5).astype(int)]
        assert abs(known_bits.mean() - by_scipy.mean()) < 1e-4
        apart = [abs((a - b).mean()) / math.sqrt((a.var() + b.var()) / len(a)) for a, b in paired.values()]
        assert max(apart) < 4 and abs(paired["learned"][0].mean()) < 1e-3 and paired["learned"][0].std() < 0.01
        assert max(error.max() for error in term_errors.values()) < 0.06
        assert np.abs(excess["learned"]).max() < 1e-3 and -1.1 < slope < -0.9
        assert all(np.allclose(measured[v], excess[v][[1, 3, 5]], atol=0.05) for v in names), (measured, excess)
        assert abs(ddpm_gap - (expected_terms(ddpm, "fixed_small").sum() - entropy)) < 0.1 and ddpm_gap > 0.5
    """,
    "05_progressive_gan": """
        assert same_image and same_score and 0 < lost < 0.5
        flops = np.array(list(costs.values()))
        assert (flops[2:] > 2.5 * flops[1:-1]).all(), costs
        assert all(abs(value - 2) < 0.2 for value in variances.values()), variances
        he, equal = speeds.values()
        assert 0.9 < equal[-1] / equal[0] < 1.1 and 6 < he[-1] / he[0] < 10, speeds
        for (gain, on), values in chains.items():
            assert np.allclose(values, 1, atol=1e-3) if on else gain == 1 or values[-1] > 50, chains
        assert spreads["one digit"] < 1e-3 and spreads["one digit"] < spreads["one digit, noise 0.1"] < spreads["threes"]
        assert spreads["threes"] < spreads["digits"], spreads
        assert penalty_gap < 1e-4 and abs(jnp.linalg.norm(w) - best) < 0.01 and aligned > 0.999
        assert update._cache_size() == 2  # a program a stage
        assert swd["other digits"] < swd["trained"] < swd["untrained"] / 3, swd
    """,
}


def test_every_notebook_is_tested_and_stored_without_outputs():
    assert sorted(CLAIMS) == sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
    for name in CLAIMS:
        for cell in nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells:
            assert cell.cell_type == "markdown" or (cell.outputs, cell.execution_count) == ([], None)


@pytest.mark.parametrize(
    "name",
    [
        "01_forward_process",
        pytest.param("02_train_ddpm", marks=pytest.mark.slow),
        pytest.param("03_inception_score_and_fid", marks=pytest.mark.slow),
        pytest.param("04_variational_bound", marks=pytest.mark.slow),
        pytest.param("05_progressive_gan", marks=pytest.mark.slow),
    ],
)
def test_notebook_runs(name, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))  # nobody's start-up files
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))  # searched first
    write_kernel_spec(tmp_path / "kernels" / "python3")  # its command is sys.executable
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    right_kernel = f"import sys; assert sys.executable == {sys.executable!r}\n"
    notebook.cells.append(nbformat.v4.new_code_cell(right_kernel + textwrap.dedent(CLAIMS[name])))
    NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOKS)}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []  # no warnings for the student
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 7
