"""Routing replay: the forwards of an update use the experts of an earlier one, whatever the batch looks like."""

import copy
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conversations.errors import ToolkitError
from deepseek_v2_modeling import record_routing
from deepseek_v2_modeling.adapters import apply_lora
from deepseek_v2_modeling.loading import LoraSettings
from rl.packing import pack_rows
from rl.rollouts.replay import ReplayedRoutes, joined

from ..helpers.models import random_ids
from ..helpers.rl import VowelsOfSome, perturbed, run, sample_from, trainer_for, untimed
from ..helpers.stages import chat_model, lines, stopped_after

PLAIN = {"beta": 0.0, "save_strategy": "no", "max_steps": 3}
TWICE = {"num_iterations": 2, "max_steps": 4}
LORA = LoraSettings(("attention", "experts"), 4, 8)


@dataclass
class Forward:
    """Of what, its rows' token ids, and the experts of each of their tokens [T, L, K], in order."""

    kind: str
    rows: list[torch.Tensor]
    experts: list[torch.Tensor]


def watch(monkeypatch):
    """All forwards over a rollout, as recorded inside the replay."""
    seen = []
    real = ReplayedRoutes.routing

    @contextmanager
    def spied(self, model, packed, rows, length):
        kind = "update" if self.updating is not None else "old" if self.is_policy(model) else "reference"
        with real(self, model, packed, rows, length) as routes, record_routing(model) as inside:
            yield routes
        read, ids = packed.index >= 0, packed.spread(packed.inputs["input_ids"][0], nothing=-1)
        experts = packed.spread(joined(inside[0]), nothing=-1).sort(-1).values
        pairs = [(ids[row][read[row]], experts[row][read[row]]) for row in range(len(ids)) if read[row].any()]
        seen.append(Forward(kind, *(list(column) for column in zip(*pairs, strict=True))))

    monkeypatch.setattr(ReplayedRoutes, "routing", spied)
    return seen


def experts_of(model, ids):
    """[T, L, K] of a forward over one row, in order."""
    with torch.no_grad(), record_routing(model) as routes:
        model(ids[None])
    return joined(routes[0]).sort(-1).values


def agree(forward, model):
    """Of all tokens but each row's last, whether their experts are the model's own."""
    pairs = zip(forward.rows, forward.experts, strict=True)
    return torch.cat([(experts == experts_of(model, ids))[:-1].all(-1).flatten() for ids, experts in pairs])


# --- from the rollout -------------------------------------------------------------------------------------------------


SETTINGS = {
    "one update": {},
    "two updates": TWICE,
    "micro-batches that split groups": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "prompts read with each answer": {"share": False},
    "rows that are not read": {"per_device_train_batch_size": 4, "steps_per_generation": 2, "max_steps": 4},
}


@pytest.mark.parametrize(
    ("lora", "settings"),
    [*((False, settings) for settings in SETTINGS.values()), (True, TWICE)],
    ids=[*SETTINGS, "LoRA"],
)
def test_the_update_uses_the_experts_of_the_rollout(tmp_path, monkeypatch, lora, settings):
    share = dict(settings).pop("share", True)
    model = chat_model(aux_loss_alpha=0.0)
    sampler, start = perturbed(model, 1.0), copy.deepcopy(model).eval()
    model = apply_lora(model, LORA.config("CAUSAL_LM")) if lora else model
    rest = {key: value for key, value in settings.items() if key != "share"}
    trainer = trainer_for(
        tmp_path, model=model, rewards=[VowelsOfSome("v")], training=PLAIN | rest, routing_replay="rollout"
    )
    monkeypatch.setattr(type(trainer), "shares_prompts", share)
    sample_from(trainer, sampler, monkeypatch)
    seen = watch(monkeypatch)
    trainer.train()
    kinds = {forward.kind for forward in seen}
    assert kinds == ({"old", "update"} if "num_iterations" in rest or "steps_per_generation" in rest else {"update"})
    assert all(agree(forward, sampler).all() for forward in seen)
    assert not all(agree(forward, start).all() for forward in seen)
    log = [line for line in lines(tmp_path / "metrics.jsonl") if "loss" in line]
    assert {line["mismatch/routes_agree"] for line in log} == {1.0}


def test_without_a_replay_they_differ(tmp_path, monkeypatch):
    model = chat_model()
    sampler = perturbed(model, 1.0)
    trainer = trainer_for(tmp_path, model=model, training=PLAIN)
    sample_from(trainer, sampler, monkeypatch)
    seen = watch(monkeypatch)
    trainer.train()
    assert not any(agree(forward, sampler).all() for forward in seen)


def test_where_rollout_and_update_agree_a_replay_changes_nothing(tmp_path):
    """float32, one model; rows that other prompts replaced."""
    settings = {"training": PLAIN, "rewards": [VowelsOfSome("v")], "dynamic_sampling": {"max_rounds": 3}}
    for replay in ("off", "rollout"):
        run(tmp_path / replay, model=chat_model(seed=3), routing_replay=replay, **settings)
    for one, other in zip(*(lines(tmp_path / name / "metrics.jsonl")[:3] for name in ("off", "rollout")), strict=True):
        one, other = untimed(one), untimed(other)
        assert one.keys() == other.keys() and one["dynamic_sampling/replaced"] == other["dynamic_sampling/replaced"]
        assert all(one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6) for key in one)


def test_sampling_that_gives_no_experts_cannot_be_replayed(tmp_path):
    training = PLAIN | {"cache_implementation": "static"}
    with pytest.raises(ToolkitError, match=r"leave out training\.cache_implementation"):
        trainer_for(tmp_path, training=training, routing_replay="rollout")
    trainer_for(tmp_path, training=training, routing_replay="update")


# --- from the old log-probabilities -----------------------------------------------------------------------------------


@pytest.mark.parametrize("replay", ["off", "update"])
def test_later_updates_use_the_experts_of_the_old_log_probabilities(tmp_path, monkeypatch, replay):
    model = chat_model()
    start = copy.deepcopy(model).eval()  # before TRL changes the model's forward
    settings = {"training": {**PLAIN, **TWICE, "learning_rate": 0.1}, "routing_replay": replay}
    trainer = trainer_for(tmp_path, model=model, **settings)
    seen = watch(monkeypatch)
    trainer.train()
    assert [forward.kind for forward in seen] == ["old", "update", "update"] * 2
    assert agree(seen[0], start).all()
    for old, *updates in (seen[:3], seen[3:]):
        same = [all(map(torch.equal, old.experts, update.experts)) for update in updates]
        assert same == [True, replay == "update"]
    log = [line for line in lines(tmp_path / "metrics.jsonl") if "loss" in line]
    assert len(log) == 4


def test_a_run_says_that_there_is_nothing_to_replay(tmp_path, capsys):
    for name, training in (("one", {}), ("two", TWICE)):
        run(tmp_path / name, training={**PLAIN, **training, "max_steps": 1}, routing_replay="update")
        assert ("has nothing to replay" in capsys.readouterr().err) == (name == "one")


@pytest.mark.parametrize("replay", ["update", "rollout"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_the_reference_chooses_for_itself(tmp_path, monkeypatch, lora, replay):
    model = chat_model(aux_loss_alpha=0.0)
    sampler, start = perturbed(model, 1.0), copy.deepcopy(model).eval()
    model = apply_lora(model, LORA.config("CAUSAL_LM")) if lora else model
    training = {**PLAIN, **TWICE, "beta": 0.1, "learning_rate": 0.1}
    trainer = trainer_for(tmp_path, model=model, training=training, routing_replay=replay)
    sample_from(trainer, sampler, monkeypatch)
    seen = watch(monkeypatch)
    trainer.train()
    assert [forward.kind for forward in seen] == ["old", "reference", "update", "update"] * 2
    for forward in seen:
        if forward.kind == "reference" or replay == "rollout":
            assert agree(forward, start if forward.kind == "reference" else sampler).all()


@pytest.mark.parametrize("replay", ["update", "rollout"])
def test_routers_get_gradients(tmp_path, replay):
    model = chat_model(aux_loss_alpha=0.0)
    start = copy.deepcopy(model)
    run(tmp_path, model=model, training={**PLAIN, **TWICE}, routing_replay=replay, train_router=True)
    gates = [name for name, _ in start.named_parameters() if "gate.weight" in name]
    moved = [(model.get_parameter(name) - start.get_parameter(name)).abs().max() for name in gates]
    assert gates and all(change > 1e-4 for change in moved)


# --- both -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replay", ["update", "rollout"])
def test_resume_between_two_updates_keeps_the_experts(tmp_path, replay):
    more = {"routing_replay": replay, "training": {"beta": 0.0, "num_iterations": 2, "max_steps": 4, "save_steps": 3}}
    run(tmp_path / "a", **more)
    checkpoint = stopped_after(tmp_path / "a" / "checkpoint-3", tmp_path / "b")
    kept = torch.load(checkpoint / "rollouts_0.pt", weights_only=True)["inputs"][0][f"{replay}_routes"]
    assert kept.dtype == torch.int16 and (kept >= 0).any()
    run(tmp_path / "b", resume_from=checkpoint, **more)
    one, other = ([untimed(x) for x in lines(tmp_path / name / "metrics.jsonl")[:4]] for name in "ab")
    assert one == other


@given(data=st.data())
def test_what_belongs_to_tokens_finds_its_packed_tokens_and_back(data: st.DataObject):
    """Groups of one prompt, rows that are not read, paddings of all lengths."""
    groups = data.draw(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3)), min_size=1, max_size=4))
    prompts = [size for size, answers in groups for _ in range(answers)]
    answers = data.draw(st.lists(st.integers(0, 4), min_size=len(prompts), max_size=len(prompts)))
    width, longest = max(prompts), max(max(answers), 1)
    columns = torch.arange(width + longest)
    rows = zip(prompts, answers, strict=True)
    mask = torch.stack([(columns >= width - prompt) & (columns < width + answer) for prompt, answer in rows])
    read = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(prompts), max_size=len(prompts))))
    mask &= read[:, None]
    if not mask.any():
        return
    group = torch.tensor([number for number, (_, size) in enumerate(groups) for _ in range(size)])
    ids = random_ids(len(prompts), width + longest)
    ids[:, :width] = random_ids(len(groups), width, seed=1)[group]
    packed = pack_rows(ids, mask.long(), longest, data.draw(st.booleans()))
    assert packed.pack(ids).tolist() == packed.inputs["input_ids"][0].tolist()
    assert torch.equal(packed.spread(packed.pack(ids), nothing=-1), ids.masked_fill(~mask, -1))
    assert sorted({*packed.index[mask].tolist()}) == list(range(packed.inputs["input_ids"].shape[1]))
