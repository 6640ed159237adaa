import pytest
from tests.support.tiny_run import Tiny, curve, make_trainer
pytestmark = pytest.mark.usefixtures("in_process")
def test_it(tiny: Tiny, tmp_path):
    losses={}
    for form in ("none","all"):
        run=tmp_path/form; run.mkdir()
        t=make_trainer(tiny, run, f"train.compile={form}", "model.moe.num_shared_experts=1", "optimizer={kind: adamw_8bit, learning_rate: 1e-3}", "logging.interval_steps=1", steps=4, zero=1)
        assert t.fit()
        losses[form]=[r["loss"] for r in curve(run) if r["kind"]=="train"]
    print(losses)
    assert losses["all"]==pytest.approx(losses["none"], rel=1e-6)
