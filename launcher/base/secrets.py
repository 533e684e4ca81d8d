"""What a secret looks like: the one list of names and shapes. Standard library only.

A config is written into output_dir, into trackers and into batch scripts, so it is refused where it holds a secret
(`is_secret`); a message that comes from elsewhere is written without the ones it holds (`redacted`). A reference
such as `$PGPASSWORD` or `$(cat FILE)` is no secret: whoever reads it still has to have the value.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

# --------------------------------------------------------------------------- shapes that issuers give their secrets

_SHAPES = tuple(
    re.compile(pattern)
    for pattern in (
        r"\b(?:hf_|api_org_)[A-Za-z0-9]{16,}",  # Hugging Face
        r"\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}",
        r"\bgl(?:pat|dt|rt|cbt|ptt|ft|soat)-[\w-]{16,}",  # GitLab
        r"(?<![\w-])sk-(?=[\w-]*\d)[A-Za-z0-9][\w-]{15,}",  # OpenAI, Anthropic, OpenRouter, …
        r"\b(?:sk|rk|pk|whsec)_(?:live|test)_[A-Za-z0-9]{10,}",  # Stripe
        r"\b(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}\b",  # AWS
        r"\bAIza[\w-]{30,}|\bya29\.[\w-]{20,}|\bGOCSPX-[\w-]{20,}",  # Google
        r"\bxox[a-z]-[\w-]{10,}|\bxapp-[\w-]{10,}",  # Slack
        r"https://hooks\.slack\.com/services/[\w/]{20,}|https://discord(?:app)?\.com/api/webhooks/\d+/[\w-]{20,}",
        r"\bnpm_[A-Za-z0-9]{30,}|\bpypi-[\w-]{40,}|\bdckr_pat_[\w-]{20,}|\brubygems_[a-f0-9]{40,}",
        r"\bgsk_[A-Za-z0-9]{20,}|\bnvapi-[\w-]{20,}|\br8_[A-Za-z0-9]{30,}|\bxai-[A-Za-z0-9]{30,}|\btgp_v1_[\w-]{30,}",
        r"\bwandb_v1_\w{20,}|\bdapi[0-9a-f]{32}|\bdop_v1_[0-9a-f]{40,}|\bhv[sb]\.[\w-]{20,}|\bATATT3[\w=-]{20,}",
        r"\bSG\.[\w-]{16,}\.[\w-]{16,}|\btskey-[\w-]{16,}|\bAGE-SECRET-KEY-1[A-Z0-9]{20,}|\blin_api_\w{20,}",
        r"\bops_eyJ[\w-]{40,}|\bpscale_(?:tkn|pw|oauth)_[\w-]{30,}|\bfigd_[\w-]{30,}|\bsbp_[0-9a-f]{40}\b",
        r"\bshp(?:at|ca|pa|ss)_[0-9a-fA-F]{32}\b|\bntn_[A-Za-z0-9]{40,}|\bsecret_[A-Za-z0-9]{43}\b",  # Shopify, Notion
        r"\bSK[0-9a-f]{32}\b|\bkey-[0-9a-f]{32}\b|\b\d{8,10}:AA[\w-]{33}(?![\w-])",  # Twilio, Mailgun, Telegram
        r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*",  # JSON Web Tokens
        r"(?s)-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----.*?(?:-----END [A-Z0-9 ]*-----|\Z)",
        r"(?<=://)(?=[\w-]*\d)[\w-]{20,}(?=@)",  # https://TOKEN@host
        r"(?<=[?&]X-Amz-Signature=)[^\s&'\"]{16,}|(?<=[?&]X-Goog-Signature=)[^\s&'\"]{16,}|(?<=[?&]sig=)[^\s&'\"]{16,}",
        r"(?i)\bbearer\s+(?=[\w.~+/-]*\d)[\w.~+/-]{12,}=*",
    )
)
_URL_PASSWORD = re.compile(r"(?<=\w)://[^\s/:@'\"]{0,200}:(?P<value>(?!\d{1,5}/)[^\s'\"@]{1,500})@")
_PROXY_PASSWORD = re.compile(r"(?<![\w/:.@-])[\w.-]{1,64}:(?P<value>[^\s:@/'\"]{3,200})@[\w.-]{1,255}:\d{2,5}(?![\w.])")
"""USER:PASSWORD@HOST:PORT, as in http_proxy."""
_HEADER = re.compile(
    r"(?i)\b(?:x-[\w-]{0,40}(?:key|token|secret)|private-token|job-token|api-key|ocp-apim-subscription-key)"
    r"['\"]?\s*:\s*['\"]?(?P<value>[^\s'\"]{8,})"
)
_AUTHORIZATION = re.compile(r"(?i)authorization['\"]?\s*[:=]\s*['\"]?(?:basic|bearer|token)\s+(?P<value>[^\s'\"]{4,})")
_COMMAND = re.compile(
    r"(?:\bcurl\b[^\n|;]{0,200}?\s(?:-u|--user|--proxy-user)[ =]?['\"]?[^\s:'\"]{1,100}:"  # curl -u USER:PASSWORD
    r"|\bsshpass\s+-p\s*|\b(?:wandb|swanlab|comet)\s+login\s+(?:--\S+\s+)*"
    r"|\bmachine\s[\s\S]{0,200}?\bpassword\s+|\bconfigure\s+set\s+\S*(?:secret_access_key|session_token)\s+"
    r"|\b(?:docker|podman|buildah|skopeo|oras|helm\s+registry)\s+login\s[^\n|;&]{0,200}?(?<=\s)-p[\s=]?"
    r"|\b(?:mysql|mysqldump|mysqladmin|mariadb)\s[^\n|;&]{0,200}?(?<=\s)-p(?=\S)|\bredis-cli\s[^\n|;&]{0,200}?(?<=\s)-a\s+)"
    r"['\"]?(?P<value>[^\s'\"-][^\s'\"]*)"
)
_ASSIGNED = re.compile(
    r"""(?:(?<![\w$.-])(?P<name>[A-Za-z_][\w.-]*)\s?=\s?          # NAME=VALUE
         |(?P<quote>["'])(?P<quoted>[A-Za-z_][\w.-]*)(?P=quote)\s*:\s*   # "name": "value"
         |(?<![\w$.-])--(?P<flag>[a-z][a-z_-]*)[\s=]\s*)                 # --password VALUE
        (?P<value>"[^"]*"|'[^']*'|[^\s,;&|"')\]}]+)""",
    re.VERBOSE,
)
_PARTS = (_URL_PASSWORD, _PROXY_PASSWORD, _HEADER, _AUTHORIZATION, _COMMAND)

# --------------------------------------------------------------------------- names that are given to secrets

_KEYS = """
api access secret private encryption decryption signing account master app application storage ssh deploy service auth
client shared subscription admin session openai anthropic azure aws gcp google gemini wandb comet neptune clearml
swanlab mistral groq cohere replicate together openrouter deepseek sas rsa kaggle hmac fernet jwt webhook vault
"""
_KEY_OF = frozenset(_KEYS.split())
_TOKENS = """
auth access api hf hub huggingface bearer refresh session secret github gitlab git gh bitbucket wandb comet neptune
slack discord personal bot oauth oauth2 csrf service deploy registry npm pypi docker user admin private aws azure gcp
google vault kaggle openai jwt id x modelscope dagshub swanlab mlflow tracking sas login
"""
_TOKEN_OF = frozenset(_TOKENS.split())
_PIECES = """
eos bos pad unk sep cls mask image img video audio vision speech boi eoi boa eoa bov eov start end stop begin special
next prev previous first last think thinking turn im per num max min new prompt response answer prefix suffix middle
fim tool call eot eom soh system assistant human content message text word sub byte chunk patch cache by each one
every decoder encoder forced suppress resize add additional
"""
_VOCABULARY = frozenset(_PIECES.split())
"""Words before `token` that make it a piece of text."""
_ENDINGS = frozenset(["b64", "base64", "pem", "value", "text", "str", "raw"])
_NO_PASSWORDS = ("bypass", "compass", "encompass", "surpass", "trespass", "overpass", "underpass")
_TRIVIAL = re.compile(r"(?i)\d{0,2}|true|false|yes|no|on|off|none|null|auto|\*+|\.{3}|…|<\w[\w -]*>")
_KEY_FILE = re.compile(r"[~/.$].*(\.(pem|key|json|ya?ml|txt|crt|p12|pfx|pub)|/\.ssh/[^/]+)")


def is_secret(key: str, value: object) -> bool:
    """Whether a setting holds a secret: by its name, by the shape of its value, or as a secret of the environment.

    Args:
        key: dotted, as in `launch.env.PGPASSWORD`.
    """
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return False
    text = str(value)
    return _is_named_secret(key, text) or (isinstance(value, str) and holds_secret(text)) or holds_secret(key)


def holds_secret(text: str) -> bool:
    """Whether any part of a text looks like a secret."""
    return next(_spans(text), None) is not None


def redacted(text: str) -> str:
    """The text with *** instead of all that looks like a secret, and of the secrets in this process's environment."""
    parts, end = [], 0
    for start, stop in sorted(_spans(text)):
        if stop <= end:
            continue
        parts += [text[end : max(start, end)], "***"]
        end = stop
    return "".join(parts) + text[end:]


def refusal(key: str) -> str:
    """Why a setting with a secret is refused, and how the secret reaches the run instead."""
    leaf = key.rpartition(".")[2]
    if key.startswith("launch.env."):
        mend = f"`export {leaf}=…` in the shell in which you start or submit the run reaches it; leave {key} out"
    elif key.startswith("launch."):
        mend = (
            "export the variable in the shell in which you submit (Slurm passes it on), or read it from a file of "
            "yours in launch.setup: export NAME=$(cat FILE)"
        )
    elif key.startswith("tracker."):
        mend = "set the tracker's own variable in the environment (WANDB_API_KEY, COMET_API_KEY, …), or log in with it"
    elif key.startswith("hydra."):
        mend = "leave it out of the URL: the database's client reads PGPASSWORD, ~/.pgpass or ~/.my.cnf"
    else:
        mend = "set it in the environment (HF_TOKEN, or run `hf auth login`; for a URL ~/.netrc), and leave it out here"
    return (
        f"{redacted(key)} holds what looks like a secret. Settings are written into output_dir, trackers and batch "
        f"scripts, so they must hold none: {mend}"
    )


def _spans(text: str) -> Iterator[tuple[int, int]]:
    """Where the secrets of a text begin and end."""
    for secret in _secrets_of_environment():
        start = text.find(secret)
        while start >= 0:
            yield start, start + len(secret)
            start = text.find(secret, start + len(secret))
    for shape in _SHAPES:
        for match in shape.finditer(text):
            yield match.span()
    for part in _PARTS:
        for match in part.finditer(text):
            if not _is_reference(match["value"]):
                yield match.span("value")
    for match in _ASSIGNED.finditer(text):
        name, value = match["name"] or match["quoted"] or f"launch.{match['flag']}", match["value"]
        inner = value[1:-1] if value[0] in "\"'" else value
        is_code = inner == value and "(" in value and not name.isupper()  # a line of a traceback
        if inner and not is_code and _is_named_secret(name, inner):
            start = match.start("value") + (inner != value)
            yield start, start + len(inner)


def _secrets_of_environment() -> list[str]:
    """Values of variables that are named like secrets, and passwords in URLs (DATABASE_URL, HF_ENDPOINT, HTTPS_PROXY),
    where they are long and odd enough not to be plain words."""
    long = [(name, value) for name, value in os.environ.items() if len(value) >= 8]
    found = [value for name, value in long if _is_named_secret(f"launch.env.{name}", value)]
    in_urls = [m["value"] for _, value in long if "@" in value for m in _URL_PASSWORD.finditer(value)]
    found += [value for value in in_urls if not _is_reference(value)]
    return [v for v in found if len(v) >= 8 and not (v.isalpha() and v.islower() and len(v) < 12)]


# --------------------------------------------------------------------------- names


def _is_named_secret(key: str, value: str) -> bool:
    """Whether a setting or variable of this name and value is a secret, whatever the value looks like."""
    value = value.strip().strip("'\"")
    if _TRIVIAL.fullmatch(value) or _is_reference(value):
        return False
    leaf = re.sub(r"\[\d+\]", "", key).rpartition(".")[2]
    is_variable = leaf.isupper() or key.startswith("launch.env.")
    words = re.split(r"[^a-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", leaf).lower())
    words = [word for word in words if word and not word.isdigit()]
    while len(words) > 1 and words[-1] in _ENDINGS:
        words.pop()
    if not words:
        return False
    last, before = words[-1].rstrip("0123456789"), words[-2] if len(words) > 1 else ""
    if last.endswith(("password", "passwd", "passphrase", "passcode", "sshpass")):
        return True
    if last.endswith("secret") or last in ("secrets", "credential", "credentials"):
        return not _is_file(value)
    if last == "pwd":
        return "/" not in value
    if last in ("pass", "pat", "pw"):
        return is_variable and bool(before)
    if last.endswith("pass"):
        return is_variable and not last.endswith(_NO_PASSWORDS)
    if last in ("auth", "authorization"):
        return ":" in value and "/" not in value
    if last in ("key", "keys"):
        return before in _KEY_OF and not _is_file(value)
    if last in ("apikey", "apikeys", "secretkey", "privatekey", "accesskey", "jwt"):
        return not _is_file(value)
    if last.endswith("token"):
        return _is_token(key, before or last.removesuffix("token"), value, is_variable=is_variable)
    return False


def _is_token(key: str, before: str, value: str, *, is_variable: bool) -> bool:
    """`…token` names a credential or a piece of text: `access_token`, `eos_token`."""
    if before in _VOCABULARY or _is_file(value) or re.search(r"[<>|]" if is_variable else r"[<>|\s\[\]{}]", value):
        return False
    if before in _TOKEN_OF or is_variable or key.startswith(("launch.", "tracker.", "hub.")):
        return True
    return len(value) >= 8 and any(c.isdigit() for c in value) and any(c.isalpha() for c in value)


def _is_reference(value: str) -> bool:
    """Something that leads to a secret for those who have it: a shell's variable or command, a placeholder."""
    return value.startswith(("$", "`", "***", "%(", "{{")) or value in ("...", "…")


def _is_file(value: str) -> bool:
    """The path of a file with a key is none itself."""
    if "\n" in value or "\0" in value or len(value) > 1024:
        return False
    return _KEY_FILE.fullmatch(value) is not None or (
        value.startswith(("/", "~", "./", "../")) and Path(value).expanduser().exists()
    )
