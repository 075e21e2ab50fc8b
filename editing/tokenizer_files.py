"""Read the tokenizer of a pipeline's folder with `tokenizers` alone, and render its chat template. Free of torch."""

import json
import struct
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from editing.errors import UnsupportedPipeline

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
"""CLIP's special tokens."""
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

_CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_settings(folder: Path) -> dict[str, Any]:
    """Read `tokenizer_config.json`, with special tokens as texts and the chat template where other files have them."""
    settings = _read_json(folder / "tokenizer_config.json")
    if _is_clip(settings):
        settings = {"bos_token": BOS, "eos_token": EOS, **settings}
    if "added_tokens_decoder" not in settings:  # older transformers name special tokens in another file
        settings |= _read_json(folder / "special_tokens_map.json", missing={})
    for name in SPECIAL_TOKENS:
        if isinstance(token := settings.get(name), dict):
            settings[name] = token["content"]
    settings["added_tokens"] = _read_json(folder / "added_tokens.json", missing={})  # as older transformers have them
    template = folder / "chat_template.jinja"
    if template.is_file():
        settings["chat_template"] = template.read_text(encoding="utf-8")
    return settings


def read_tokenizer(folder: Path, settings: Mapping[str, Any]) -> Tokenizer:
    """Read `tokenizer.json`, or build the tokenizer from `vocab.json` and `merges.txt` or from `spiece.model`.

    It gives the ids that transformers' tokenizer of the same folder gives. Raises `UnsupportedPipeline`.
    """
    try:
        if (folder / "tokenizer.json").is_file():
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        elif (folder / "vocab.json").is_file():
            tokenizer = (_build_clip_tokenizer if _is_clip(settings) else _build_qwen_tokenizer)(folder)
        elif (folder / "spiece.model").is_file():
            tokenizer = _build_t5_tokenizer((folder / "spiece.model").read_bytes(), settings)
        else:
            _refuse(f"the tokenizer in {folder.name}/ has no tokenizer.json, vocab.json or spiece.model")
        _add_tokens(tokenizer, settings)
        _set_special_tokens(tokenizer, settings)
    except UnsupportedPipeline:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise UnsupportedPipeline(f"the tokenizer in {folder.name}/ cannot be read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _is_clip(settings: Mapping[str, Any]) -> bool:
    """Return whether it is CLIP's tokenizer. The folders of SD 1.x may leave its class out."""
    return "CLIP" in str(settings.get("tokenizer_class", "CLIP"))


def render_chat(prompt: str, settings: Mapping[str, Any], options: Mapping[str, bool]) -> str:
    """Return the text of a user's message in the tokenizer's chat template. Raises `UnsupportedPipeline`."""
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name
        template = {each["name"]: each["template"] for each in template}.get("default")
    if not template:
        _refuse("the tokenizer has no chat template, which this family needs: add chat_template.jinja to its folder")
    tokens = {name: settings[name] for name in SPECIAL_TOKENS if settings.get(name)}
    try:
        rendered = _compile_chat_template(template).render(
            messages=[{"role": "user", "content": prompt}], tools=None, documents=None, **tokens, **options
        )
    except TemplateError as error:
        raise UnsupportedPipeline(f"the tokenizer's chat template cannot be rendered: {error}") from error
    return str(rendered)


@lru_cache(maxsize=8)
def _compile_chat_template(template: str) -> Any:
    """Compile a chat template as transformers does: sandboxed, for it comes with the model."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda content, **options: json.dumps(content, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = _raise_template_error
    return environment.from_string(template)


def _raise_template_error(message: str) -> NoReturn:
    raise TemplateError(message)


def _add_tokens(tokenizer: Tokenizer, settings: Mapping[str, Any]) -> None:
    """Add the tokens that the settings name and the tokenizer lacks."""
    added: list[AddedToken] = []
    for _, token in sorted(settings.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0])):
        options = {key: token[key] for key in ("lstrip", "rstrip", "normalized", "special") if key in token}
        added.append(AddedToken(token["content"], **options))
    named = [settings[name] for name in SPECIAL_TOKENS if settings.get(name)]
    known = {token.content for token in (*added, *tokenizer.get_added_tokens_decoder().values())}
    for content, _ in sorted(settings.get("added_tokens", {}).items(), key=lambda item: int(item[1])):
        if content not in known:
            added.append(AddedToken(content, special=content in named, normalized=content not in named))
    known |= {token.content for token in added}
    # As in CLIPTokenizer: if "!" is the padding, every "!" of a prompt becomes that special token.
    added += [AddedToken(token, special=True, normalized=False) for token in dict.fromkeys(named) if token not in known]
    tokenizer.add_tokens(added)


def _set_special_tokens(tokenizer: Tokenizer, settings: Mapping[str, Any]) -> None:
    """Add the first and last token where `add_bos_token` or `add_eos_token` says so."""
    if not {"add_bos_token", "add_eos_token"} & settings.keys() and tokenizer.post_processor is not None:
        return
    bos, eos = (settings.get(f"{name}_token") if settings.get(f"add_{name}_token") else None for name in ("bos", "eos"))
    single = " ".join(part for part in (bos and f"{bos}:0", "$A:0", eos and f"{eos}:0") if part)
    pair = " ".join(part for part in (single, bos and f"{bos}:1", "$B:1", eos and f"{eos}:1") if part)
    tokens = [(token, find_token(tokenizer, token)) for token in (bos, eos) if token]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=tokens)


def find_token(tokenizer: Tokenizer, token: str) -> int:
    """Return a token's id. Raises `UnsupportedPipeline`."""
    token_id = tokenizer.token_to_id(token)
    if token_id is None:
        _refuse(f"the tokenizer has no token {token!r}")
    return int(token_id)


def _build_clip_tokenizer(folder: Path) -> Tokenizer:
    """Build CLIP's tokenizer from its two files, as SD 1.x has it."""
    tokenizer = Tokenizer(
        models.BPE.from_file(
            *_name_byte_pairs(folder), unk_token=EOS, continuing_subword_prefix="", end_of_word_suffix="</w>"
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    eos, bos = ((token, find_token(tokenizer, token)) for token in (EOS, BOS))
    tokenizer.post_processor = processors.RobertaProcessing(eos, bos, trim_offsets=False, add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (BOS, EOS)])
    return tokenizer


def _build_qwen_tokenizer(folder: Path) -> Tokenizer:
    """Build the tokenizer of Qwen 2 and later from its two files, as Qwen-Image has it."""
    tokenizer = Tokenizer(models.BPE.from_file(*_name_byte_pairs(folder)))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def _name_byte_pairs(folder: Path) -> tuple[str, str]:
    return str(folder / "vocab.json"), str(folder / "merges.txt")


def _build_t5_tokenizer(model: bytes, settings: Mapping[str, Any]) -> Tokenizer:
    """Build T5's tokenizer from its SentencePiece model, as PixArt and Chroma have it."""
    pieces: list[tuple[str, float]] = []
    charsmap = b""
    for number, content in _read_fields(model):
        fields = dict(_read_fields(content)) if isinstance(content, bytes) else {}
        if number == 1:  # pieces: text and score
            pieces.append((fields[1].decode(), fields.get(2, 0.0)))
        elif number == 3:  # the normalizer
            charsmap = fields.get(2, b"")
    extra = int(settings.get("extra_ids", 100))
    pieces += [(f"<extra_id_{number}>", 0.0) for number in range(extra - 1, -1, -1)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    if charsmap:
        tokenizer.normalizer = normalizers.Precompiled(charsmap)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    end = find_token(tokenizer, "</s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", end)]
    )
    return tokenizer


def _read_fields(message: bytes) -> Iterable[tuple[int, Any]]:
    """Yield the fields of a protobuf message: bytes, integers, or floats of four bytes."""
    position = 0

    def read_varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while position < len(message):
        number, kind = divmod(read_varint(), 8)
        if kind == 0:
            yield number, read_varint()
            continue
        size = {1: 8, 2: 0, 5: 4}[kind] or read_varint()
        content = message[position : position + size]
        position += size
        yield number, struct.unpack("<f", content)[0] if kind == 5 else content


def _read_json(path: Path, *, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    if missing is not None and not path.is_file():
        return missing
    try:
        settings = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, RecursionError, ValueError) as error:
        raise UnsupportedPipeline(f"{path.parent.name}/ has no readable {path.name}") from error
    if not isinstance(settings, dict):
        _refuse(f"{path.parent.name}/{path.name} is no JSON object")
    return settings


def _refuse(detail: str) -> NoReturn:
    raise UnsupportedPipeline(detail)
