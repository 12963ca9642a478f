"""The files in accelerate_configs/, as `accelerate launch` reads them; nothing is trained."""

import os
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import BackwardPrefetch, ShardingStrategy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from recipelib.runtime.files import load_yaml

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
FSDP = [one for one in FILES if load_yaml(one)["distributed_type"] == "FSDP"]
# Offloading needs a GPU to offload from, FSDP1 one to send the first process's weights from.
NEED_GPUS = {"fsdp1.yaml", "fsdp2_offload.yaml"}
# Keys that accelerate treats apart, instead of taking them for a default of its command line.
APART = {"distributed_type", "mixed_precision", "fsdp_config"}

every_file = pytest.mark.parametrize("file", FILES, ids=lambda one: one.name)
every_fsdp_file = pytest.mark.parametrize("file", FSDP, ids=lambda one: one.name)


@dataclass
class Launch:
    """What `accelerate launch` would have started."""

    arguments: SimpleNamespace  # its command line, completed by the config file
    environment: dict[str, str]  # of the processes
    torchrun: SimpleNamespace | None  # torchrun's arguments; None for a plain process
    plugin: FullyShardedDataParallelPlugin | None  # as a process will make it, under FSDP


@pytest.fixture
def launch(monkeypatch):
    """Runs `accelerate launch` on these words up to where it would start processes."""
    started = {}
    monkeypatch.chdir(ROOT)

    def run(torchrun):
        started.update(torchrun=torchrun, environment=dict(os.environ))
        fsdp = started["environment"].get("ACCELERATE_USE_FSDP") == "true"
        started["plugin"] = FullyShardedDataParallelPlugin() if fsdp else None

    def popen(command, env):
        started.update(torchrun=None, environment=env, plugin=None)
        return SimpleNamespace(wait=lambda: None, returncode=0)

    monkeypatch.setattr("torch.distributed.run.run", run)
    monkeypatch.setattr("accelerate.commands.launch.subprocess", SimpleNamespace(Popen=popen))
    monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda port: False)
    # FSDP1's plugin asks for the GPU to put the first process's weights on.
    monkeypatch.setattr("accelerate.utils.dataclasses.is_cuda_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)

    def start(*words: str) -> Launch:
        started.clear()
        arguments = launch_command_parser().parse_args(list(words))
        launch_command(arguments)
        return Launch(arguments, **started)

    return start


def with_config(launch, file: Path, *options: str) -> Launch:
    return launch("--config_file", str(file), *options, "recipes/lora_sft.py")


def header(file: Path) -> str:
    """The comment that a file begins with, without its # marks."""
    lines = file.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    assert all(line.startswith("#") for line in lines), f"{file.name} begins with its header"
    return "\n".join(line[1:] for line in lines)


def commands(file: Path, program: str = "accelerate launch") -> list[list[str]]:
    """The commands in a file's header, in words, that begin with `program`."""
    lines = re.sub(r"\\\n\s*", "", header(file)).splitlines()
    return [shlex.split(line) for line in lines if line.strip().startswith(f"{program} ")]


def without_effect(launch, file: Path) -> list[str]:
    """The keys of a config whose values do not arrive; accelerate is silent about them."""
    config = load_yaml(file)
    ready = with_config(launch, file)
    given = vars(ready.arguments)
    lost = [key for key in config.keys() - APART if given.get(key) != config[key]]
    for key, value in config.get("fsdp_config", {}).items():
        arrived = ready.environment.get(key.upper(), "")
        if arrived.lower() != str(value).lower():
            lost.append(key)
    return sorted(lost)


def test_there_is_a_config_for_every_need():
    assert [one.stem for one in FILES] == [
        "ddp",
        "fsdp1",
        "fsdp2",
        "fsdp2_offload",
        "fsdp2_sharded",
        "multi_node",
        "one_gpu",
        "pipeline",
    ]


@every_file
def test_every_key_has_the_effect_that_it_states(launch, file):
    assert without_effect(launch, file) == []


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("  fsdp_reshard_after_foward: false", "fsdp_reshard_after_foward"),
        ("  fsdp_limit_all_gathers: false", "fsdp_limit_all_gathers"),
        ("same_network: true", "same_network"),  # known, but the command line's default wins
    ],
)
def test_a_key_that_accelerate_drops_silently_is_found(launch, tmp_path, line, key):
    file = tmp_path / "typo.yaml"
    text = (ROOT / "accelerate_configs" / "fsdp2.yaml").read_text(encoding="utf-8")
    file.write_text(f"{text}{line}\n")
    assert without_effect(launch, file) == [key]


def test_accelerate_itself_refuses_an_unknown_key_of_the_top_level(launch, tmp_path):
    file = tmp_path / "typo.yaml"
    file.write_text("distributed_type: 'NO'\nnum_process: 1\n")
    with pytest.raises(ValueError, match="num_process"):
        with_config(launch, file)


@every_file
def test_the_recipe_decides_on_the_precision(launch, file):
    assert with_config(launch, file).environment["ACCELERATE_MIXED_PRECISION"] == "no"


@every_fsdp_file
def test_fsdp_wraps_each_layer_and_reads_the_weights_once(launch, file):
    plugin = with_config(launch, file).plugin
    assert load_yaml(file)["fsdp_config"]["fsdp_version"] == plugin.fsdp_version
    assert plugin.auto_wrap_policy is transformer_auto_wrap_policy
    assert plugin.cpu_ram_efficient_loading


@every_fsdp_file
def test_activation_checkpointing_is_left_to_the_recipe(launch, file):
    # Stated, so that a reader finds it; the recipe refuses two owners.
    assert load_yaml(file)["fsdp_config"]["fsdp_activation_checkpointing"] is False
    assert not with_config(launch, file).plugin.activation_checkpointing


@pytest.mark.parametrize(
    ("name", "offloads", "state_dict"),
    [
        ("fsdp2", False, "FULL_STATE_DICT"),
        ("fsdp2_offload", True, "FULL_STATE_DICT"),
        ("fsdp2_sharded", False, "SHARDED_STATE_DICT"),
        ("multi_node", False, "FULL_STATE_DICT"),
    ],
)
def test_fsdp2_shards_all_that_it_can(launch, name, offloads, state_dict):
    plugin = with_config(launch, ROOT / "accelerate_configs" / f"{name}.yaml").plugin
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert (type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy") == offloads
    assert plugin.state_dict_type.name == state_dict


def test_fsdp1_shards_all_that_it_can_and_fits_peft(launch):
    plugin = with_config(launch, ROOT / "accelerate_configs" / "fsdp1.yaml").plugin
    assert plugin.fsdp_version == 1
    assert plugin.sharding_strategy is ShardingStrategy.FULL_SHARD
    assert plugin.backward_prefetch is BackwardPrefetch.BACKWARD_PRE
    assert plugin.use_orig_params
    assert plugin.sync_module_states
    assert not plugin.cpu_offload.offload_params
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"


@pytest.mark.parametrize(
    "file", [one for one in FILES if one.stem != "multi_node"], ids=lambda one: one.name
)
def test_one_machine_starts_a_process_per_gpu_unless_told_otherwise(launch, file):
    ready = with_config(launch, file)
    assert ready.arguments.num_machines == 1
    if file.stem == "one_gpu":
        assert ready.torchrun is None
        assert ready.arguments.num_processes == 1
        assert ready.environment["ACCELERATE_USE_CPU"] == "False"
        return
    assert (ready.torchrun.nnodes, ready.torchrun.nproc_per_node) == ("1:1", "8")
    assert with_config(launch, file, "--num_processes", "3").torchrun.nproc_per_node == "3"


@pytest.mark.parametrize("name", ["ddp", "pipeline"])
def test_data_parallel_training_and_a_pipeline_have_nothing_to_do_with_fsdp(launch, name):
    ready = with_config(launch, ROOT / "accelerate_configs" / f"{name}.yaml")
    assert ready.arguments.multi_gpu
    assert not {key for key in ready.environment if key.startswith(("FSDP_", "ACCELERATE_USE_"))}


def test_the_two_machines_are_launched_alike_but_for_their_rank(launch):
    file = ROOT / "accelerate_configs" / "multi_node.yaml"
    words = [one for one in commands(file) if "--machine_rank" in one]
    runs = [launch(*one[2:]).torchrun for one in words]
    assert [one.node_rank for one in runs] == [0, 1]
    for one in runs:
        assert (one.nnodes, one.nproc_per_node, one.rdzv_backend) == ("2", "8", "static")
        assert one.rdzv_endpoint == "10.0.0.1:29500"


# The launchers of several machines. Each program that they call is a few lines that write down
# what it was given.

FAKES = {
    "scontrol": 'echo "scontrol $*" >> "$TOLD/scheduler"; echo node7; echo node9',
    "scancel": 'echo "scancel $*" >> "$TOLD/scheduler"',
    "srun": """shift
        for number in 0 1; do SLURM_NODEID=$number "$@" || exit; done""",
    "ssh": 'shift 2; bash -c "$1"',
    "accelerate": """for word in "$@"; do echo "$word"; done > "$TOLD/$$"; exit "${CODE:-0}" """,
}
SLURM = {
    "SLURM_JOB_ID": "41007",
    "SLURM_JOB_NODELIST": "node[7,9]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_GPUS_ON_NODE": "4",
}
RECIPE = ["recipes/lora_sft.py", "--template", "a b.yaml", "--save_steps", "50"]


@pytest.fixture
def on_machines(tmp_path):
    """Runs a launcher of several machines; gives its exit code, the words of each machine's
    `accelerate`, in the order of the machines, and what the scheduler was told.
    """
    told = tmp_path / "told"
    told.mkdir()
    for name, does in FAKES.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{does}\n")
        (tmp_path / name).chmod(0o755)

    def run(script: str, *words: str, srun: str | None = None, **variables: str) -> tuple:
        if srun:
            (tmp_path / "srun").write_text(f"#!/usr/bin/env bash\n{srun}\n")
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", str(ROOT / "accelerate_configs" / script), *words],
            env={**os.environ, "PATH": path, "TOLD": str(told), **variables},
            cwd=ROOT,
            timeout=60,
        )
        scheduler = told / "scheduler"
        lines = scheduler.read_text().splitlines() if scheduler.exists() else []
        files = [file for file in told.iterdir() if file != scheduler]
        launches = [file.read_text().splitlines() for file in files]
        launches.sort(key=lambda words: words[words.index("--machine_rank") + 1])
        return done.returncode, launches, lines

    return run


def test_slurm_launches_once_on_each_node_and_goes_on_where_it_was_stopped(launch, on_machines):
    code, launches, scheduler = on_machines("slurm.sbatch", *RECIPE, **SLURM)
    assert (code, scheduler) == (0, ["scontrol show hostnames node[7,9]"])
    for rank, words in enumerate(launches):
        ready = launch(*words[1:])
        one = ready.torchrun
        assert (one.nnodes, one.nproc_per_node, one.node_rank) == ("2", "4", rank)
        assert one.rdzv_endpoint == "node7:21007"
        assert one.training_script_args == [*RECIPE[1:], "--resume_from_checkpoint", "auto"]
        assert ready.environment["FSDP_VERSION"] == "2"
    assert len(launches) == 2


def test_slurm_is_asked_for_one_launcher_a_node_and_to_queue_the_job_again(on_machines):
    text = (ROOT / "accelerate_configs" / "slurm.sbatch").read_text(encoding="utf-8")
    asked = re.findall(r"^#SBATCH (\S+)$", text, re.MULTILINE)
    assert {"--requeue", "--ntasks-per-node=1", "--signal=B:USR1@300"} <= {*asked}
    # Slurm stops to read its lines at the first command.
    assert text.rindex("#SBATCH") < text.index("\nset ")


@pytest.mark.parametrize(
    ("srun", "code", "told"),
    [
        ("kill -USR1 $PPID; sleep 0.3; exit 3", 3, ["scancel --signal=TERM 41007", "requeue"]),
        ("kill -USR1 $PPID; sleep 0.3; exit 0", 0, ["scancel --signal=TERM 41007"]),  # was done
        ("exit 3", 3, []),  # a failure of its own would only repeat
    ],
)
def test_a_job_whose_time_runs_out_saves_and_is_queued_again(srun, code, told, on_machines):
    ended, _, scheduler = on_machines("slurm.sbatch", *RECIPE, srun=srun, **SLURM)
    assert ended == code
    assert scheduler[1:] == [line.replace("requeue", "scontrol requeue 41007") for line in told]


def test_ssh_launches_once_on_each_machine_and_all_end_with_the_first_failure(launch, on_machines):
    code, launches, _ = on_machines("ssh.sh", "10.0.0.5 10.0.0.6", "8", *RECIPE)
    assert code == 0
    runs = [launch(*words[1:]).torchrun for words in launches]
    assert [one.node_rank for one in runs] == [0, 1]
    for one in runs:
        assert (one.nnodes, one.nproc_per_node) == ("2", "8")
        assert one.rdzv_endpoint == "10.0.0.5:29500"
        assert one.training_script_args == RECIPE[1:]
    assert on_machines("ssh.sh", "10.0.0.5 10.0.0.6", "8", *RECIPE, CODE="5")[0] == 5


# The headers


@every_file
def test_a_header_says_when_to_choose_the_file_and_what_it_costs(file):
    text = header(file)
    assert len(text.splitlines()) <= 20
    assert max(map(len, file.read_text(encoding="utf-8").splitlines())) <= 100
    for part in ("Choose it when ", "Choose another: ", "Cost", "memory", "traffic", "disk"):
        assert part.lower() in text.lower(), part
    cost = text.partition("Cost")[2].partition("Launch")[0]
    assert re.search(r"\d+ bytes per |as in fsdp2\.yaml", cost)


@every_file
def test_a_header_names_only_files_that_are_there(file):
    text = header(file)
    for name in re.findall(r"\b\w+\.yaml", text):
        assert (ROOT / "accelerate_configs" / name).is_file(), name
    for name in re.findall(r"recipes/\w+\.py", text):
        assert (ROOT / name).is_file(), name


@every_file
def test_a_header_shows_how_to_launch_with_its_own_file(launch, file):
    shown = commands(file)
    assert shown
    for words in shown:
        ready = launch(*words[2:])
        assert ready.arguments.config_file == f"accelerate_configs/{file.name}"
        recipe = "gpipe_sft" if file.stem == "pipeline" else "lora_sft"
        assert ready.arguments.training_script == f"recipes/{recipe}.py"


@every_file
def test_a_header_shows_a_rehearsal_where_one_is_possible(launch, file):
    rehearsals = [words for words in commands(file) if "--max_steps" in words]
    assert bool(rehearsals) == (file.name not in NEED_GPUS)
    if not rehearsals:
        assert "needs GPUs; rehearse with fsdp2.yaml" in header(file)
    for words in rehearsals:
        ready = launch(*words[2:])
        assert ready.arguments.training_script_args == ["--max_steps", "5"]
        if ready.torchrun is not None:
            assert (ready.torchrun.nnodes, ready.torchrun.nproc_per_node) == ("1:1", "2")


def test_the_sharded_config_shows_how_to_resume_and_how_to_make_a_checkpoint_whole():
    file = ROOT / "accelerate_configs" / "fsdp2_sharded.yaml"
    assert any("--resume_from_checkpoint" in words for words in commands(file))
    (words,) = commands(file, program="python")
    assert words == ["python", "recipes/consolidate.py", "runs/lora_sft/checkpoint-20"]
