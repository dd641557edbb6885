"""The cluster file: what it says for each stage, and what is refused."""

from pathlib import Path

import pytest
import yaml

from minima.cluster.config import Cluster, time_seconds
from minima.cluster.loading import load_cluster
from minima.cluster.secret import check_lines, names_secret
from minima.errors import ClusterError
from minima.recipe.schema import Recipe
from tests.unit.cluster.conftest import BASE, CORPUS, OUT

RECIPE = Recipe(name="test", stages=[CORPUS, BASE, OUT])


def load(tmp_path: Path, text: str) -> Cluster:
    path = tmp_path / "cluster.yaml"
    path.write_text(text, encoding="utf-8")
    return load_cluster(path)


def test_a_name_wins_over_a_kind_over_defaults_over_the_top(tmp_path):
    cluster = load(
        tmp_path,
        """
        partition: top
        account: money
        time: 60
        defaults: {partition: default, nodes: 2, gpus_per_node: 4, qos: low}
        stages:
          adapt: {partition: kind, nodes: 3}
          base: {partition: name}
        """,
    )
    base, out = cluster.resources(RECIPE.stage("base")), cluster.resources(RECIPE.stage("out"))
    assert (base.partition, base.nodes, base.qos, base.account, base.time) == ("name", 3, "low", "money", "60")
    assert (out.partition, out.nodes) == ("default", 2)
    assert base.ranks == 12  # one for each GPU


def test_what_yaml_takes_for_a_number_is_a_word_of_sbatch(tmp_path):
    base = load(tmp_path, "account: 4711\ndefaults: {memory: 0}").resources(RECIPE.stage("base"))
    assert (base.account, base.memory) == ("4711", "0")
    for text in ("0123", "0899", "010"):  # octal, or nearly, in YAML 1.1
        assert load(tmp_path, f"account: {text}").resources(RECIPE.stage("base")).account == text


def test_one_process_is_given_one_rank_whatever_the_defaults_say(tmp_path):
    cluster = load(tmp_path, "defaults: {nodes: 4, ranks_per_node: 8}")
    assert cluster.resources(RECIPE.stage("corpus")).ranks == 1
    assert cluster.resources(RECIPE.stage("base")).ranks == 32


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: {build_data: {nodes: 2}}", "a build_data stage runs in a single process"),
        ("stages: {corpus: {ranks_per_node: 2}}", "a build_data stage runs in a single process"),
        ("stages: {base: {array: 4}}", "only a build_data stage can be divided"),
    ],
)
def test_resources_that_nothing_would_use(tmp_path, text, message):
    cluster = load(tmp_path, text)
    with pytest.raises(ClusterError, match=message):
        [cluster.resources(stage) for stage in RECIPE.stages]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partitoin: gpu", "did you mean 'partition'"),
        ("defaults: {node: 3}", "did you mean 'nodes'"),
        ("stages: {base: {gpus: 3}}", r"stages.base.gpus: no such key"),
        ("stages: {time: {partiton: x}}", "stages.time.partiton: no such key; did you mean 'partition'"),
        ("container: {img: x}", r"container.img"),
        ("partition: gpu\npartition: cpu", "given twice"),
        ("- a", "no keys and values"),
        ("time: soon", "time limit 'soon'"),
        ("time: 4\nsignal_lead_seconds: 300", "told to save and end right after it starts"),
        ("time: 60\nstages: {base: {time: 5}}", "base: a time limit of 300 s"),
        ("partition: 'gpu --wrap=x'", "partition: must be one word of letters, digits and .* not 'gpu --wrap=x'"),
        ('account: "a\\nb"', "account"),
        ("defaults: {memory: '1 G'}", "memory"),
        ("defaults: {sbatch_options: ['-p x']}", "sbatch_options.0: must be one option of sbatch, .* not '-p x'"),
        ('venv: "a\\nb"', "venv: must be one line"),
        ("defaults: {nodes: two}", "defaults.nodes: must be a whole number, not 'two'"),
        ("environment: {'A B': 1}", "is not a valid variable name"),
        ("environment: {A: [1]}", "a variable must be text"),
        ("defaults: {nodes: 0}", "nodes"),
    ],
)
def test_what_is_refused(tmp_path, text, message):
    with pytest.raises(ClusterError, match=message):
        load(tmp_path, text)


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "wandb_apikey"])
def test_a_token_is_refused_and_not_repeated(tmp_path, name):
    with pytest.raises(ClusterError, match="jobs inherit its environment") as caught:
        load(tmp_path, f"environment: {{{name}: hf_verysecret}}")
    assert "verysecret" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "TOKEN",
        "token",
        "HF_TOKEN",
        "HF_TOKEN_2",
        "GITHUB_TOKEN_WRITE",
        "SUPER_TOKEN",
        "accessToken",
        "tokenValue",
        "hf-token",
        "PGPASSWORD",
        "Password",
        "CLIENT_SECRET",
        "MODAL_TOKEN_SECRET",
        "WANDB_API_KEY",
        "wandb_apikey",
        "api-key",
        "apiKey",
        "OPENAI_API_KEYS",
        "MY_CREDENTIALS",
    ],
)
def test_names_of_secrets(name):
    assert names_secret(name)
    with pytest.raises(ClusterError, match=f"{name} looks like a secret"):
        check_lines("preamble", [f"python prepare.py --{name}=abc"], shell=True)


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer",
        "TOKENIZER",
        "TOKENIZERS_PARALLELISM",
        "MAX_TOKENS",
        "NUM_TOKENS",
        "maxTokens",
        "tokens",
        "add_bos_token",
        "pad_token_id",
        "eos-token",
        "COST_PER_TOKEN",
        "TOKEN_BUDGET",
        "HF_TOKEN_PATH",
        "token_file",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN",
        "SECRETARY",
        "KEY",
        "GOOGLE_APPLICATION_CREDENTIALS",
    ],
)
def test_names_that_only_sound_like_those_of_secrets(name):
    assert not names_secret(name)
    check_lines("preamble", [f"python prepare.py --{name}=abc"], shell=True)


@pytest.mark.parametrize(
    "text",
    [
        "preamble: [export HF_HUB_DISABLE_IMPLICIT_TOKEN=1]",
        "preamble: [python prepare.py --tokenizer=/data/tok]",
        "preamble: [export MAX_TOKENS=512]",
        "srun_options: ['--export=ALL,NUM_TOKENS=3']",
        "environment: {ARGS: 'pretrained=a,tokenizer=b', HF_HUB_DISABLE_IMPLICIT_TOKEN: 1}",
    ],
)
def test_lines_that_hold_no_secret(tmp_path, text):
    ((key, given),) = yaml.safe_load(text).items()
    kept = getattr(load(tmp_path, text), key)
    assert kept == (given if isinstance(given, list) else {name: str(value) for name, value in given.items()})


def test_an_option_is_refused_with_the_name_of_a_variable():
    with pytest.raises(ClusterError, match="export HF_TOKEN in your shell") as caught:
        check_lines("srun_options", ["--hf-token=verysecret"], shell=False)
    assert "verysecret" not in str(caught.value)


HUB = "hf_" + "verysecret" * 3


@pytest.mark.parametrize(
    "text",
    [
        "defaults: {sbatch_options: ['--export=ALL,HF_TOKEN=verysecret']}",
        "stages: {base: {sbatch_options: ['--export=WANDB_API_KEY=verysecret,ALL']}}",
        "defaults: {sbatch_options: ['-p HF_TOKEN=verysecret']}",  # refused for another reason, too
        "srun_options: ['--export=ALL,HF_TOKEN=verysecret']",
        "srun_options: ['--export=HF_TOKEN=$verysecret']",  # no shell reads it
        "container: {image: a, options: ['--env=HF_TOKEN=verysecret']}",
        "preamble: ['export HF_TOKEN=verysecret']",
        "preamble: ['module load cuda; DB_PASSWORD=\"verysecret\" make']",
        "preamble: [\"export HF_TOKEN='very$secret'\"]",
        "preamble: export HF_TOKEN=verysecret",
        f"preamble: ['hf auth login --token {HUB}']",
        f"environment: {{MINE: {HUB}}}",
        "environment: {HTTPS_PROXY: 'http://me:verysecret@proxy:3128'}",
        "environment: {MY_KEY: ghp_verysecretverysecret12}",
        "environment: {OPENAI_KEY: sk-proj-verysecretverysecret}",
        "preamble: ['huggingface-cli login --token verysecret']",
        "preamble: ['pip install --index-url https://__token__:verysecret@host/simple x']",
    ],
)
def test_a_token_is_refused_in_lines_and_options_and_not_repeated(tmp_path, text):
    with pytest.raises(ClusterError, match="jobs inherit its environment") as caught:
        load(tmp_path, text)
    assert "secret" not in str(caught.value).replace("looks like a secret", "")


@pytest.mark.parametrize(
    "line",
    [
        "export HF_TOKEN=$(cat ~/.token)",
        'export HF_TOKEN="$(< ~/.token)" WANDB_API_KEY=${KEY}',
        "hf auth login --token $HF_TOKEN --add-to-git-credential",
        "export HTTPS_PROXY=http://$USER:$PROXY_WORD@proxy:3128",
        "python prepare.py --tokenizer /data/tok --max-tokens 512 --eos-token 3",
        "git clone ssh://git@host:22/a/b && ssh://host:22/x@y",
        "cd /data/cs-sk-translation-benchmark/sk-wikipedia-20240601-clean",
        "cat ~/.pw | podman login -u me --password-stdin registry.example.com",
        "hf auth login --token < ~/.token --use-auth-token true",
        "apptainer pull docker://ubuntu:22.04@sha256:aa",
        "export HF_TOKEN=`cat ~/.token`",
        "export HF_TOKEN= TOKENIZERS_PARALLELISM=false HF_TOKEN_PATH=/home/me/.token",
        "pip install hf_transfer hf_xet",
        "unset HF_TOKEN",
    ],
)
def test_a_preamble_may_read_a_token(tmp_path, line):
    assert load(tmp_path, yaml.safe_dump({"preamble": [line]})).preamble == [line]


def test_a_variable_that_only_sounds_like_one(tmp_path):
    cluster = load(tmp_path, "environment: {TOKENIZERS_PARALLELISM: false, NCCL_DEBUG: WARN, N: 2}")
    assert cluster.environment == {"TOKENIZERS_PARALLELISM": "0", "NCCL_DEBUG": "WARN", "N": "2"}


def test_a_time_is_not_read_as_a_number_of_base_60(tmp_path):
    assert load(tmp_path, "time: 24:00:00").time == "24:00:00"  # YAML 1.1 says 86400, which Slurm reads as 60 days
    assert load(tmp_path, "time: 90").time == "90"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("10:30", 630), ("24:00:00", 86400), ("1-12", 129600), ("1-0:30", 88200), (None, None)],
)
def test_times_as_slurm_reads_them(text, seconds):
    assert time_seconds(text) == seconds


def test_a_missing_file():
    with pytest.raises(ClusterError, match=r"cluster\.example\.yaml"):
        load_cluster(Path("nowhere.yaml"))
