"""The one list of what a secret looks like, both ways: what is one, and what only resembles one."""

# ruff: noqa: E501 - tables
from __future__ import annotations

import pytest

from launcher.base.secrets import holds_secret, is_secret, redacted

_HEX = "0123456789abcdef0123456789abcdef01234567"
_JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"
_PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIEowIBAAKCAQEA7\nabc+/=\n-----END RSA PRIVATE KEY-----"

NAMED = [
    "GITHUB_TOKEN", "GH_TOKEN", "GITLAB_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN", "TOKEN",
    "CI_JOB_TOKEN", "NPM_TOKEN", "VAULT_TOKEN", "AWS_SESSION_TOKEN", "SLACK_BOT_TOKEN", "MLFLOW_TRACKING_TOKEN",
    "PGPASSWORD", "MYSQL_PWD", "DB_PASS", "DB_PASSWORD", "REDIS_PASSWORD", "MLFLOW_TRACKING_PASSWORD", "SSHPASS",
    "PASSPHRASE", "PRIVATE_KEY", "SSH_PRIVATE_KEY", "API_KEY", "WANDB_API_KEY", "COMET_API_KEY", "OPENAI_API_KEY",
    "OPENAI_KEY", "APIKEY", "AWS_SECRET_ACCESS_KEY", "AZURE_STORAGE_KEY", "AZURE_CLIENT_SECRET", "CLIENT_SECRET",
    "SECRET", "DJANGO_SECRET_KEY", "ENCRYPTION_KEY", "GITHUB_PAT", "JWT", "API_KEY_2", "PRIVATE_KEY_BASE64",
    "my_password", "NEPTUNE_API_TOKEN", "KAGGLE_KEY_SECRET", "CLEARML_API_SECRET_KEY", "DOCKER_AUTH_TOKEN",
    "KAGGLE_KEY", "DBPASS", "LDAP_BIND_PW", "ADMIN_PW", "HMAC_KEY", "NGROK_AUTHTOKEN",
]  # fmt: skip

OTHER_KEYS = [
    "tracker.init_kwargs.wandb.api_key", "tracker.init_kwargs.token", "tracker.init_kwargs.mlflow.password",
    "tracker.init_kwargs.comet_ml.apiKey", "tracker.init_kwargs.wandb.settings.apiKey", "data.generator.access_token",
    "eval.metric.openai_api_key", "eval.metric.clientSecret", "strategy.deepspeed.monitor.password",
    "tracker.init_kwargs.api_keys[0]", "hub.token", "model.quantization.hf_token",
]  # fmt: skip

SHAPES = [
    "hf_" + "a1B2c3D4" * 4, "ghp_" + "a1B2" * 9, "gho_" + "a1B2" * 9, "github_pat_" + "11ABC_" * 8,
    "glpat-" + "x1y2z3w4v5u6t7s8r9q0", "sk-" + "a1B2" * 12, "sk-proj-" + "a1_B2-" * 8, "sk-ant-api03-" + "a1B2" * 10,
    "AKIAIOSFODNN7EXAMPLE", "ASIAIOSFODNN7EXAMPLE", "AIza" + "a1B2c" * 7, "xoxb-123456789012-abcdefABCDEF", _JWT, _PEM,
    "npm_" + "a1B2" * 9, "dckr_pat_" + "a1B2" * 7, "gsk_" + "a1B2" * 12, "nvapi-" + "a1B2" * 12, "sk_live_" + "a1B2" * 6,
    "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNz", "-----BEGIN PRIVATE KEY-----", "hvs." + "a1B2" * 6,
    "postgresql://me:hunter2@db.example.com/runs", "redis://:hunter2@cache:6379/0", "https://user:pa%20ss@host/x.jsonl",
    "mongodb+srv://u:p@ss@cluster.example.net", "https://ghp_" + "a1B2" * 9 + "@github.com/o/r",
    "https://" + _HEX + "@git.example.com/o/r", "mysql://root:p/w@host/db", "http://proxy:3128x@proxy:3128",
    "Server=db;User Id=sa;Password=hunter2;", "UID=sa;PWD=hunter2", "host=db user=me password=hunter2 dbname=runs",
    "DefaultEndpointsProtocol=https;AccountName=me;AccountKey=abcd1234==;EndpointSuffix=core.windows.net",
    "ALL,PGPASSWORD=hunter2", "export GITHUB_TOKEN=hunter2", 'export GITHUB_TOKEN="hunter 2"', "GITHUB_TOKEN='x y' cmd",
    "curl -H 'Authorization: Bearer abcdefgh12345678' https://x", "curl -u me:hunter2 https://x", "sshpass -p hunter2 ssh x",
    "wandb login " + _HEX, "docker login --password hunter2", "cmd --api-key hunter2", "cmd --token=hunter2",
    "Authorization: Basic dXNlcjpwYXNz", "https://x.example/a?api_key=hunter2&b=1", '{"api_key": "hunter2"}',
    "{'password': 'hunter2'}", "https://s3.example/x?X-Amz-Signature=" + _HEX, "machine h login me password hunter2",
    "https://acc.blob.core.windows.net/c?sv=1&sig=" + _HEX, "https://hooks.slack.com/services/T00000000/B00000000/" + "x" * 24,
    "aws configure set aws_secret_access_key hunter2", "machine h\n  login me\n  password hunter2", "me:hunter2@proxy:3128",
    "docker login -u me -p hunter2 registry.example", "mysql -u root -phunter2 db", "redis-cli -h cache -a hunter2 ping",
    "123456789:AA" + "a1B2c" * 6 + "a1B", "ops_eyJ" + "a1B2" * 12, "pscale_tkn_" + "a1B2" * 9, "figd_" + "a1B2" * 10,
    "shpat_" + _HEX[:32], "sbp_" + _HEX, "ntn_" + "a1B2" * 11, "secret_" + "a1B2" * 10 + "a1B", "SK" + _HEX[:32],
    "key-" + _HEX[:32], "curl -H 'X-Api-Key: hunter2hunter2' https://x", "curl -H 'PRIVATE-TOKEN: hunter2hunter2' https://x",
    "jdbc:postgresql://db/x?user=me&password=hunter2", "amqp://guest:hunter2@rabbit:5672/", "wget --http-password=hunter2 u",
]  # fmt: skip

NO_SECRETS = {
    "data.max_length": 1024, "data.max_length ": "2048", "model.tokenizer_name_or_path": "org/tokenizer-v2",
    "model.eos_token": "<|im_end|>", "model.add_tokens": "<tool_call>", "model.add_tokens[0]": "<|think|>",
    "eval.metric.max_new_tokens": 48, "eval.metric.num_tokens": 12345, "eval.metric.end_token": "</s>9abc12345",
    "eval.metric.stop_token": "x1y2z3w4v5", "model.config.eos_token": "tok123456", "model.config.pad_token_id": 128001,
    "model.config.image_token": "img_12345678", "eval.metric.token": "yes", "model.eos_token ": "im_end_0123456",
    "launch.env.HF_TOKEN_PATH": "/home/me/.hf/token", "launch.env.HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    "launch.env.TOKENIZERS_PARALLELISM": "false", "launch.env.GOOGLE_APPLICATION_CREDENTIALS": "/home/me/key.json",
    "launch.env.PGPASSFILE": "/home/me/.pgpass", "launch.env.SSH_PRIVATE_KEY": "~/.ssh/id_ed25519",
    "launch.env.PWD": "/home/me/work", "launch.env.OLDPWD": "/home/me", "launch.env.SSH_AUTH_SOCK": "/tmp/agent.sock",
    "launch.env.NCCL_DEBUG": "INFO", "launch.env.MAX_TOKENS": "4096", "launch.env.PYTORCH_CUDA_ALLOC_CONF": "a:b",
    "launch.env.SECRET_NAME": "wandb", "launch.env.API_KEY_FILE": "/run/secrets/key", "launch.env.CACHE_KEY": "v2-abc",
    "launch.env.WANDB_API_KEY": "$WANDB_API_KEY", "launch.env.COLOR_PASS": "", "launch.env.PGPASSWORD": "",
    "launch.env.PUBLIC_KEY": "abc", "launch.env.HTTPS_PROXY": "http://proxy.example.com:3128/",
    "launch.setup[0]": "export GITHUB_TOKEN=$(cat ~/.secrets/github)", "launch.setup[1]": "module load cuda/12.4",
    "launch.setup[2]": 'export PGPASSWORD="$PGPASSWORD"', "launch.setup[3]": "source ~/.secrets/env.sh",
    "launch.setup[4]": 'curl -H "Authorization: Bearer $TOKEN" https://x', "launch.setup[5]": "export TOKENIZERS_PARALLELISM=true",
    "launch.setup[6]": "git clone https://user:$GITHUB_TOKEN@github.com/o/r", "launch.setup[7]": "wandb login --relogin",
    "launch.sbatch.export": "ALL,NCCL_DEBUG=INFO", "launch.sbatch.comment": "max_length=2048 eos_token=x",
    "launch.env.BYPASS": "abc123", "launch.env.COMPASS": "n0rth1", "launch.env.TOKEN_BUDGET": "100000",
    "launch.env.http_proxy": "http://proxy:3128", "launch.env.https_proxy": "http://me@proxy:3128", "launch.env.KEYBOARD": "us105",
    "launch.setup[8]": "mysql -p -u me db", "launch.setup[9]": "docker run -p 8080:80 image:tag", "launch.setup[10]": "mkdir -p /tmp/a1",
    "launch.setup[11]": "curl -u $USER:$PASSWORD https://x", "launch.setup[12]": "docker pull image:v1@sha256:" + _HEX + "0" * 24,
    "launch.setup[13]": "git clone git@github.com:me/x.git", "launch.setup[14]": "redis-cli ping", "model.revision": _HEX,
    "model.revision ": "sha256:" + "0123456789abcdef" * 4, "model.model_name_or_path ": "sk-hynix/llama-3-8b-instruct",
    "x.monkey": "george12", "data.columns.passage": "passage_text1", "x.keyword": "k3yword", "data.columns.keys": "a1b2",
    "data.train_files[1]": "/data/key/secret-keys/train.jsonl", "run_name  ": "token-ablation-2024", "x.num_tokens": 12345,
    "hydra.sweeper.storage": "postgresql://me@db:5432/x", "eval.metric.answer_key": "answer1",
    "data.dataset_name": "open-r1/OpenR1-Math-220k", "model.model_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct",
    "checkpoint.resume_from_checkpoint": "hf://org/name@main", "output_dir": "outputs/optim.learning_rate=1e-05,seed=2",
    "run_name": "task-sk-learning-rate-sweep", "run_name ": "disk-0123456789abcdef0123", "data.train_files[0]": "s3://bucket/x@1.jsonl",
    "data.generator.url": "http://localhost:8080/rows@v1", "tracker.init_kwargs.wandb.entity": "my-team",
    "tracker.init_kwargs.wandb.tags[0]": "password-free", "tracker.init_kwargs.wandb.project": "token-classification",
    "data.chat_template": "{% set eos_token = '<|im_end|>' %}{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}",
    "data.columns.prompt": "question", "optim.kwargs.foreach": "false", "train.token": "x", "hub.hub_model_id": "org/hf_model",
    "data.chat_template ": "Your secret password is never asked for. The token: use it; key: value", "seed": 42,
    "eval.metric.forward_pass": "second", "model.config.architectures[0]": "Qwen2ForTokenClassification",
    "data.sources[0].weight": 0.5, "data.generator.sort_key": "length", "eval.metric.primary_key": "id",
    "model.config.use_auth_token": "false", "tracker.init_kwargs.mlflow.tracking_uri": "http://127.0.0.1:5000",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_variable_is_a_secret_when_it_is_named_like_one(name: str) -> None:
    assert is_secret(f"launch.env.{name}", "hunter2abc")
    assert holds_secret(f"export {name}=hunter2abc") and holds_secret(f"ALL,{name}=hunter2abc")
    assert "hunter2abc" not in redacted(f"cannot connect with {name}=hunter2abc and 'hunter'")


@pytest.mark.parametrize("key", OTHER_KEYS)
def test_setting_is_a_secret_when_it_is_named_like_one(key: str) -> None:
    assert is_secret(key, "abcdefgh12")


@pytest.mark.parametrize("text", SHAPES)
def test_value_is_a_secret_when_it_has_the_shape_of_one(text: str) -> None:
    for key in ("run_name", "launch.env.X", "launch.setup[0]", "data.generator.dsn", "launch.sbatch.comment"):
        assert is_secret(key, text)
    shown = redacted(f"ConnectError: {text} refused")
    assert (
        shown.startswith("ConnectError: ") and (shown.endswith(" refused") or "-----BEGIN" in text) and "***" in shown
    )
    for part in (
        "hunter2",
        "hunter 2",
        _HEX,
        "a1B2a1B2",
        "MIIE",
        "dozjgNry",
        "EXAMPLE",
        "b3Blbn",
        "dXNlcjp",
        "abcd1234",
    ):
        assert part not in shown
    assert redacted(shown) == shown and not holds_secret(shown)


@pytest.mark.parametrize(("key", "value"), list(NO_SECRETS.items()))
def test_setting_is_taken_when_it_only_resembles_a_secret(key: str, value: object) -> None:
    assert not is_secret(key.strip(), value)
    assert redacted(str(value)) == str(value)


def test_secret_of_the_environment_is_found_under_any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVICE_PASSWORD", "correct-horse-9")
    assert is_secret("run_name", "correct-horse-9") and is_secret("data.generator.x", "a correct-horse-9 b")
    assert redacted("login failed for correct-horse-9!") == "login failed for ***!"
    monkeypatch.setenv("SERVICE_PASSWORD", "training")
    assert redacted("training goes on") == "training goes on"


def test_password_of_an_address_in_the_environment_is_found_without_its_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A driver tells what it could not use: `invalid port: 'correct-horse-9@hub.intern'`."""
    for name in ("HF_ENDPOINT", "HTTPS_PROXY", "DB"):
        monkeypatch.setenv(name, "https://me:correct-horse-9@hub.intern/rows")
        assert redacted("nonnumeric port: 'correct-horse-9@hub.intern'") == "nonnumeric port: '***@hub.intern'"
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_ENDPOINT", "https://me@hub.intern:8443/x")
    assert redacted("nonnumeric port: 'correct-horse-9'") == "nonnumeric port: 'correct-horse-9'"


def test_text_stays_as_it_is_when_it_holds_no_secret() -> None:
    text = "checkpoint.save_total_limit must be at least 1 (got 0). To keep no checkpoints: checkpoint=off"
    assert redacted(text) == text
    assert redacted("set HF_TOKEN or run `hf auth login`") == "set HF_TOKEN or run `hf auth login`"


def test_long_text_is_searched_in_time_that_grows_with_it() -> None:
    import time

    began = time.perf_counter()
    for part in ("a=", "://", "-----BEGIN ", "x", '"a":', "curl -", "machine ", "a://b:", "eyJabcdefgh.", "sk-", "--a"):
        redacted(part * (50_000 // len(part)))
    assert time.perf_counter() - began < 5


def test_lines_of_code_stay_readable_in_a_traceback() -> None:
    for line in (
        "self.iou_token = nn.Embedding(1, self.hidden_size)",
        "storage_key = (",
        "api_key = os.environ.get(name)",
    ):
        assert redacted(line) == line
    assert redacted('api_key = "hunter2hunter2"') == 'api_key = "***"'
    assert redacted("PGPASSWORD=hunter(2)") != "PGPASSWORD=hunter(2)"
