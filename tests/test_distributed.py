"""Processes and accumulation: 1, 2 and 4 of each take the same steps; FSDP2 shards; the rest is refused.

Everything is float64, without padding and with losses that are means over examples, so that splitting a batch changes
the order of sums and nothing else: numbers agree to 1e-9, signs and flips exactly.
"""

import multiprocessing
import os
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from pages import run_page
from test_trainer import Sentences, assert_same, bert, trainer_for
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import rebnn_hf
from rebnn_hf import ReBNNConfig, ReBNNTrainingArguments
from rebnn_hf.checkpoints import damage

multiprocessing.set_forkserver_preload(["rebnn_hf.trainer", "torch.distributed.fsdp", "test_trainer"])

CONFIG = Path(__file__).parents[1] / "recipes" / "accelerate" / "two_nodes.yaml"

BATCH = 16
"""Examples in a step, however many processes share them."""

STEPS = {"weights": 4, "few bits": 1}
"""Of a few bits one only: sums of few codes land on thresholds, where the last digit decides between two codes."""

CONFIGS = {"weights": ReBNNConfig(), "few bits": ReBNNConfig.preset("rebnn-bit-w1a1")}
PLANS = [("weights", 1), ("weights", 2), ("weights", 4), ("few bits", 1), ("few bits", 4)]
RULES = {
    "paper": ReBNNConfig(word_embeddings=True),  # 50 rows: uneven shards
    "decoupled": ReBNNConfig(balance_form="decoupled"),
    "maxgrad": ReBNNConfig(balance_rule="maxgrad", weight_scale="mean_abs"),
}


# ----------------------------------------------------------------------------------------------------- the processes


@pytest.fixture(scope="module", params=[2, 4])
def processes(request, tmp_path_factory):
    """Folder with what each process of a group of 2 or 4 left, and their number."""
    folder, world = tmp_path_factory.mktemp(f"processes-{request.param}"), request.param
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The server imports once, and forks before anything was computed.
    torch.multiprocessing.start_processes(_work, args=(world, port, folder), nprocs=world, start_method="forkserver")
    return folder, world


def _work(rank, world, port, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    found = {plan: train(folder, *plan, world) for plan in PLANS}
    found["uneven"] = train_uneven(folder, world, drop_last=False)
    found["drop_last"] = train_uneven(folder, world, drop_last=True)
    found["own loop"] = step_of_ones_own(rank, world, accumulation=2)
    if world == 2:
        found["resumed"] = resume(folder)
    for name, config in RULES.items():
        found["fsdp", name] = train_sharded(config, rank, world)
    found["page"] = train_by_the_page(rank, world)
    found["nan"] = step_with_nan(rank, world)
    found["refused"] = refused_shards(world)
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def results(processes):
    """What the processes found."""
    folder, world = processes
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


# ---------------------------------------------------------------------------------- the Trainer: data parallel, DDP


def trainer(folder, config, world=1, accumulation=1, **options):
    """The example's trainer, with losses on labels, logits and hidden states."""
    return trainer_for(
        folder,
        rebnn_hf.binarize(bert(seed=1).double(), config),
        bert(seed=2).double(),
        per_device_train_batch_size=BATCH // world // accumulation,
        gradient_accumulation_steps=accumulation,
        optim="sgd",
        label_weight=0.5,
        hidden_loss="mse",
        learning_rate=0.05,
        latent_learning_rate=10.0,
        **{"dataset": Sentences(64, length=4), "log_oscillation": "layer", **options},
    )


def train(folder, config, accumulation, world=1, **options):
    """Final state and the logs of every step."""
    run = trainer(folder, CONFIGS[config], world, accumulation, **{"max_steps": STEPS[config], **options})
    run.train()
    logs = [{k: v for k, v in log.items() if k != "loss"} for log in run.state.log_history if "loss" in log]
    return {"state": {name: value.clone() for name, value in run.model.state_dict().items()}, "logs": logs}


def train_uneven(folder, world, drop_last):
    """Two epochs of 40 examples: the third batch of an epoch is short."""
    return train(
        folder, "weights", 1, world, dataset=Sentences(40, length=4), dataloader_drop_last=drop_last, max_steps=6
    )


def signs(state):
    return {name: value >= 0 for name, value in state.items() if name.endswith("weight") and value.ndim == 2}


def assert_agree(found, expected):
    """Numbers to rounding, signs and the flips of every layer and step exactly."""
    assert found["state"].keys() == expected["state"].keys()
    for name, value in expected["state"].items():
        near = {"rtol": 1e-9, "atol": 1e-10}
        torch.testing.assert_close(found["state"][name], value, **near, msg=lambda text, name=name: f"{name}: {text}")
    assert_same(signs(found["state"]), signs(expected["state"]))
    for mine, theirs in zip(found["logs"], expected["logs"], strict=True):
        for name, value in theirs.items():
            if name.startswith("flip"):
                assert mine[name] == value, name
            elif name.startswith(("loss", "balance")):
                assert mine[name] == pytest.approx(value, rel=1e-9), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process finds without accumulation."""
    folder = tmp_path_factory.mktemp("alone")
    found = {config: train(folder, config, 1) for config in CONFIGS}
    return found | {"drop_last": train_uneven(folder, 1, True), "uneven": train_uneven(folder, 1, False)}


def flips(run):
    return sum(log["flip_ratio"] for log in run["logs"])


@pytest.mark.parametrize("config, accumulation", [plan for plan in PLANS if plan[1] > 1])
def test_accumulation_takes_the_steps_of_one_batch(config, accumulation, alone, tmp_path):
    assert flips(alone[config]) > 0.01
    assert_agree(train(tmp_path, config, accumulation), alone[config])


@pytest.mark.slow
def test_processes_take_the_steps_of_one(processes, alone):
    """Teacher, distillation and first scales of activations included."""
    for plan in PLANS:
        ranks = [found[plan] for found in results(processes)]
        for rank in ranks:
            assert_agree(rank, alone[plan[0]])
            assert_same(rank["state"], ranks[0]["state"])  # bit for bit


def test_a_short_last_batch_is_filled_or_dropped(processes, alone):
    """accelerate fills the last batch of an epoch with examples from its start: all before it agrees with one process.

    Without short batches everything agrees, to the last of six steps.
    """
    ranks = results(processes)
    for found in ranks:
        assert_agree(found["drop_last"], alone["drop_last"])
        assert_same(found["uneven"]["state"], ranks[0]["uneven"]["state"])
        assert len(found["uneven"]["logs"]) == len(alone["uneven"]["logs"]) == 6
        for mine, theirs in zip(found["uneven"]["logs"][:2], alone["uneven"]["logs"], strict=False):
            assert mine["flip_ratio"] == theirs["flip_ratio"] > 0


def resume(folder):
    """A run with dropout and a checkpoint in the middle, and its second half once more from there."""
    runs = []
    for checkpoint in (None, str(folder / "run" / "checkpoint-2")):
        run = trainer_for(
            folder / "run", rebnn_hf.binarize(bert(seed=1, dropout=0.1)), save_strategy="steps", save_steps=2
        )
        run.train(resume_from_checkpoint=checkpoint)
        runs.append({name: value.clone() for name, value in run.model.state_dict().items()})
    return runs


@pytest.mark.slow
def test_checkpoints_of_two_processes_are_whole_and_continue_exactly(processes):
    folder, world = processes
    if world == 4:
        pytest.skip("the checkpoint is one of two processes")
    for found in results(processes):
        whole, resumed = found["resumed"]
        assert_same(whole, resumed)
    assert sorted(path.name for path in (folder / "run").iterdir()) == ["checkpoint-2", "checkpoint-4"]
    for checkpoint in (folder / "run").iterdir():
        assert damage(checkpoint) is None
        assert sorted(path.name for path in checkpoint.glob("rng*")) == ["rng_state_0.pth", "rng_state_1.pth"]


# -------------------------------------------------------------------------------- few bits in a loop of one's own, DDP


def calibrated(parts):
    """Few-bit model with scales from the whole batch of a step."""
    model = latent(CONFIGS["few bits"])
    rebnn_hf.calibrate(model, next(batches()), parts=parts)
    return model


def step_of_ones_own(rank=0, world=1, accumulation=1, parts=None):
    """State after one step of a loop without Trainer."""
    model = calibrated(parts or world * accumulation)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    rebnn_hf.attach(optimizer, model)
    shared = DistributedDataParallel(model) if world > 1 else model
    share = next(batches(rank, world))
    for index in range(accumulation):
        size = BATCH // world // accumulation
        part = {name: values[index * size : (index + 1) * size] for name, values in share.items()}
        last = index == accumulation - 1
        with shared.no_sync() if world > 1 and not last else nullcontext():
            (shared(**part).loss / accumulation).backward()
    optimizer.step()
    return model.state_dict()


def assert_equal_states(found, expected):
    for name, value in expected.items():
        near = {"rtol": 1e-9, "atol": 1e-10}
        torch.testing.assert_close(found[name], value, **near, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_loop_of_ones_own_takes_the_step_of_the_trainer(accumulation, tmp_path):
    """With few-bit activations, whose scales have a gradient that depends on the size of the whole batch."""
    run = trainer_for(
        tmp_path,
        calibrated(parts=1),
        None,
        Sentences(BATCH, length=4),
        per_device_train_batch_size=BATCH // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        max_grad_norm=0.0,
        optim="sgd",
        learning_rate=0.05,
    )
    run.train()
    mine = step_of_ones_own(accumulation=accumulation)
    assert_equal_states(mine, run.model.state_dict())
    if accumulation > 1:
        start, blind = calibrated(1).state_dict(), step_of_ones_own(accumulation=accumulation, parts=1)
        for name in (name for name in mine if name.endswith(".scale")):
            torch.testing.assert_close(blind[name] - start[name], accumulation**0.5 * (mine[name] - start[name]))


def test_processes_of_a_loop_of_ones_own_take_the_step_of_one(processes):
    expected = step_of_ones_own()
    for found in results(processes):
        assert_equal_states(found["own loop"], expected)


# ---------------------------------------------------------------------------------------------- weights sharded, FSDP2


def sharded(model, world):
    """The model with its rows spread over the processes."""
    mesh = init_device_mesh("cpu", (world,))
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def latent(config):
    return rebnn_hf.binarize(bert(seed=1).double(), config)


def batches(rank=0, world=1):
    """For every step the share of a process."""
    data, share = Sentences(64, length=4), BATCH // world
    for start in range(rank * share, 64, BATCH):
        items = [data[index] for index in range(start, start + share)]
        yield {name: torch.stack([torch.as_tensor(item[name]) for item in items]) for name in items[0]}


def train_sharded(config, rank=0, world=1):
    """Steps of a loop of one's own; with several processes the weights are sharded."""
    model = latent(config) if world == 1 else sharded(latent(config), world)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    return take_steps(model, optimizer, rebnn_hf.attach(optimizer, model), rank, world)


def train_by_the_page(rank=0, world=1):
    """The same by the code of docs/distributed.md; of one process, without sharding."""
    model = latent(ReBNNConfig())
    if world == 1:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        return take_steps(model, optimizer, rebnn_hf.attach(optimizer, model))
    given = {"model": model, "mesh": init_device_mesh("cpu", (world,)), "batch": next(batches(rank, world))}
    names = run_page("distributed.md", given | {"accumulation": 1})
    return take_steps(names["model"], names["optimizer"], names["resilience"], rank, world)


def take_steps(model, optimizer, resilience, rank=0, world=1):
    """Final state, the logs of every step, and how much of a weight lies in this process at most."""
    logs = []
    for batch in batches(rank, world):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        log = {f"{what}/{name}": v for name, one in resilience.statistics().items() for what, v in one.items()}
        logs.append(log | {"loss_reconstruction": resilience.reconstruction_loss()})
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    shares = [p.to_local().numel() / p.numel() for p in model.parameters()] if world > 1 else [1.0]
    return {"state": state, "logs": logs, "largest_share": max(shares[:8])}


def step_with_nan(rank, world):
    """One process has a NaN in its rows; the message of each, and whether anything changed."""
    model = sharded(latent(ReBNNConfig()), world)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    rebnn_hf.attach(optimizer, model)
    model(**next(batches(rank, world))).loss.backward()
    weight = model.bert.encoder.layer[0].output.dense.weight
    before = weight.to_local().clone()
    if rank == 1:
        weight.grad.to_local()[0, 0] = float("nan")
    with pytest.raises(ValueError) as error:
        optimizer.step()
    return str(error.value), torch.equal(weight.to_local(), before)


def refused_shards(world):
    """What is said about shards that the rule cannot serve, and about verbs that need whole weights."""
    messages = []
    for attempt in (
        lambda: rebnn_hf.attach(*optimized(sharded(latent(ReBNNConfig(scale_granularity="tensor")), world))),
        lambda: rebnn_hf.pack(sharded(latent(ReBNNConfig()), world)),
        lambda: rebnn_hf.calibrate(sharded(latent(CONFIGS["few bits"]), world), next(batches())),
        lambda: shard_too_late(world),
    ):
        with pytest.raises(ValueError) as error:
            attempt()
        messages.append(str(error.value))
    return messages


def optimized(model):
    return torch.optim.SGD(model.parameters(), lr=0.1), model


def shard_too_late(world):
    model = latent(ReBNNConfig())
    optimizer, _ = optimized(model)
    rebnn_hf.attach(optimizer, model)
    sharded(model, world)(**next(batches())).loss.backward()
    optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_sharded_training_takes_the_steps_of_one_process(rule, processes, tmp_path):
    """Weights, scales, balance, flips and statistics; gathered, it packs to the same bits."""
    expected = train_sharded(RULES[rule])
    assert max(log["flip_ratio/bert.encoder.layer.0.output.dense"] for log in expected["logs"]) > 0
    for found in results(processes):
        assert_agree(found["fsdp", rule], expected)
        for mine, theirs in zip(found["fsdp", rule]["logs"], expected["logs"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-9, abs=1e-12)
        assert found["fsdp", rule]["largest_share"] < 0.6, "the weights really are sharded"
    packed = []
    for run in (expected, results(processes)[0]["fsdp", rule]):
        model = latent(RULES[rule])
        model.load_state_dict(run["state"])
        rebnn_hf.pack(model).save_pretrained(tmp_path)
        packed.append(type(model).from_pretrained(tmp_path, dtype=torch.float64).state_dict())
    for name, value in packed[0].items():
        exact = value.dtype == torch.uint8
        torch.testing.assert_close(packed[1][name], value, rtol=0 if exact else 1e-9, atol=0 if exact else 1e-10)


@pytest.mark.slow
def test_the_page_shards_and_takes_the_steps_of_one_process(processes):
    expected = train_by_the_page()
    for found in results(processes):
        assert_agree(found["page"], expected)
        assert found["page"]["largest_share"] < 0.6


def test_a_nan_on_one_process_stops_all_of_them_before_the_step(processes):
    messages, unchanged = zip(*(found["nan"] for found in results(processes)), strict=True)
    assert all(unchanged)
    assert all("holds NaN or infinity, and the step was not taken" in message for message in messages)
    assert "on another process" in messages[0] and "layer.0.output.dense" in messages[1]


def test_shards_that_cannot_be_served_are_refused(processes):
    for found in results(processes):
        tensor, packing, calibration, late = found["refused"]
        assert "one mean or scale for its whole weight" in tensor and "DistributedDataParallel" in tensor
        assert "get_model_state_dict" in packing
        assert "call calibrate() before fully_shard()" in calibration
        assert "does not hold" in late and "fully_shard()" in late


# ------------------------------------------------------------------------------------------------- several machines

WORKER = """
from accelerate import PartialState
process = PartialState(cpu=True)
process.wait_for_everyone()
print("process", process.process_index, "of", process.num_processes, "local", process.local_process_index)
"""


@pytest.mark.slow
def test_the_config_for_two_machines_launches(tmp_path):
    """Both on this one, without GPUs and with one process each; all else is as in the file."""
    (tmp_path / "worker.py").write_text(WORKER)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIG)]
    here = ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", port]
    machines = [
        subprocess.Popen(
            [*command, *here, "--machine_rank", rank, "--mixed_precision", "no", str(tmp_path / "worker.py")],
            env={**os.environ, "ACCELERATE_USE_CPU": "true"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    for rank, machine in enumerate(machines):
        output, errors = machine.communicate(timeout=300)
        assert f"process {rank} of 2 local 0" in output, errors
    config = load_config_from_file(str(CONFIG))
    assert (config.num_machines, config.num_processes, config.distributed_type) == (2, 16, "MULTI_GPU")


# ---------------------------------------------------------------------------------------------- what is not supported


def test_data_parallel_is_refused(tmp_path):
    student = rebnn_hf.binarize(bert())
    with pytest.raises(ValueError, match=r"DataParallel.*use DistributedDataParallel"):
        trainer_for(tmp_path, nn.DataParallel(student))
    arguments = ReBNNTrainingArguments(str(tmp_path), use_cpu=True)
    assert arguments.n_gpu == 0
    arguments._n_gpu = 2  # what a process that sees two GPUs finds
    with pytest.raises(ValueError, match=r"sees 2 GPUs.*CUDA_VISIBLE_DEVICES=0"):
        rebnn_hf.ReBNNTrainer(model=student, args=arguments)


def test_deepspeed_is_refused_at_the_start(tmp_path):
    with pytest.raises(ValueError, match=r"DeepSpeed steps flat copies.*use DistributedDataParallel"):
        ReBNNTrainingArguments(str(tmp_path), deepspeed={"zero_optimization": {"stage": 2}})
    model = latent(ReBNNConfig())
    model.classifier.weight.ds_id = 0  # how ZeRO-3 marks parameters
    with pytest.raises(ValueError, match=r"DeepSpeed.*FSDP2"):
        rebnn_hf.attach(torch.optim.SGD(model.parameters(), lr=0.1), model)


def test_weights_that_are_exchanged_behind_the_optimizer_are_noticed():
    """As ZeRO does after attach(): flat copies in place of the parameters."""
    model = latent(ReBNNConfig())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rebnn_hf.attach(optimizer, model)
    model(**next(batches())).loss.backward()
    optimizer.param_groups[0]["params"] = [nn.Parameter(p.detach().flatten()) for p in model.parameters()]
    with pytest.raises(ValueError, match=r"does not hold 12 of 12 latent weights.*DeepSpeed put flat copies"):
        optimizer.step()


def test_fsdp_through_the_trainer_is_refused(tmp_path):
    """On a CPU accelerate would leave it out without a word."""
    with pytest.raises(ValueError, match=r"FSDP through the Trainer.*use DistributedDataParallel.*fully_shard"):
        ReBNNTrainingArguments(str(tmp_path), fsdp="full_shard")
