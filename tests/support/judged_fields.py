"""What each field of a request could do to the monitor, as judged by a person; written to docs/request-fields.md.

A field that vLLM has and that does not stand here makes ``tests/engine/test_request_fields.py`` fail: somebody has to
look at it before it is served.
"""

from __future__ import annotations

from enum import Enum


class Judgement(Enum):
    """What a field may do."""

    READ = "goes into the prompt: its tokens are scored"
    SAMPLED = "changes which tokens come or when they end: each is scored as it comes"
    SHOWN = "changes what of a reply is shown: of a blocked one nothing is left to show"
    REFUSED = "refused"
    COMPOSED = "joined with the server's own, which stays in force"
    IGNORED = "does nothing on a monitored server, or not to what is generated"


R, S, V, X, C, N = (
    Judgement.READ,
    Judgement.SAMPLED,
    Judgement.SHOWN,
    Judgement.REFUSED,
    Judgement.COMPOSED,
    Judgement.IGNORED,
)

JUDGED: dict[str, tuple[Judgement, str]] = {
    "_all_stop_token_ids": (S, "private to vLLM, which sets it anew"),
    "_bad_words_token_ids": (S, "private to vLLM, which sets it anew"),
    "_eos_token_id": (S, "private to vLLM, which sets it anew"),
    "_watermarking_skipped": (N, "private to vLLM"),
    "add_generation_prompt": (R, "without it the prompt may end within a reply, which stream rules read"),
    "add_special_tokens": (R, "the tokens that are added are read too"),
    "allowed_token_ids": (S, ""),
    "apply_softmax": (V, ""),
    "audio": (R, "of models that hear; their rows are read like others"),
    "background": (X, "a reply would be fetched later by whoever knows its id; needs the store, which is refused"),
    "bad_words": (S, ""),
    "best_of": (X, "of beam search"),
    "cache_salt": (C, "it still keeps a client's prefixes apart; steered prefixes have the server's salt as well"),
    "chat_template": (X, "vLLM refuses it unless told to trust requests; then the server does not start"),
    "chat_template_kwargs": (R, "the roles are told from what is rendered with them"),
    "choice": (S, "of structured outputs"),
    "continue_final_message": (R, "the prompt ends within a reply: stream rules read it"),
    "detokenize": (V, "only of raw sampling parameters, whose route is refused"),
    "disable_additional_properties": (S, "of structured outputs"),
    "disable_any_whitespace": (S, "of structured outputs"),
    "documents": (R, ""),
    "early_stopping": (X, "of beam search"),
    "ec_transfer_params": (X, "what another engine has computed, nobody has scored"),
    "echo": (V, "shows the client's own prompt"),
    "enable_response_messages": (V, ""),
    "extra_args": (X, "our own keys in it; the rest is vLLM's to read"),
    "flat_logprobs": (V, ""),
    "frequency_penalty": (S, ""),
    "grammar": (S, "of structured outputs"),
    "guided_decoding_backend": (S, ""),
    "ignore_eos": (S, "the reply goes on, and is read on"),
    "images": (R, "of models that see; their rows are read like others"),
    "include": (V, ""),
    "include_reasoning": (V, "reasoning that is not shown is scored"),
    "include_stop_str_in_output": (V, ""),
    "input": (R, ""),
    "instructions": (R, ""),
    "item_first": (R, ""),
    "items": (R, ""),
    "json": (S, "of structured outputs"),
    "json_object": (S, "of structured outputs"),
    "kv_transfer_params": (X, "what another engine has computed, nobody has scored"),
    "label_token_ids": (S, ""),
    "length_penalty": (X, "of beam search"),
    "logit_bias": (S, ""),
    "logprob_token_ids": (V, ""),
    "logprobs": (V, "none of a reply that was blocked"),
    "max_completion_tokens": (S, ""),
    "max_output_tokens": (S, ""),
    "max_tokens": (S, "one at a time: the reply so far comes back as a prompt, and stream rules read it there"),
    "max_tool_calls": (S, ""),
    "media_io_kwargs": (R, "of models that see or hear"),
    "messages": (R, ""),
    "metadata": (N, ""),
    "min_p": (S, ""),
    "min_tokens": (S, ""),
    "mm_payload": (X, "what another engine has prepared"),
    "mm_processor_kwargs": (R, "of models that see or hear"),
    "model": (N, "names the model; with tenants only those that the key has"),
    "n": (S, "each choice is judged; `scope: request` blocks all"),
    "output_config": (S, ""),
    "output_kind": (V, "only of raw sampling parameters, whose route is refused"),
    "output_text_buffer_length": (V, "private to vLLM, which sets it anew"),
    "parallel_tool_calls": (V, ""),
    "presence_penalty": (S, ""),
    "previous_input_messages": (R, "rendered into the prompt"),
    "previous_response_id": (X, "needs the store of responses, which is refused"),
    "priority": (X, "below 0: those are the canaries'. Others only order the queue"),
    "prompt": (R, ""),
    "prompt_cache_key": (N, ""),
    "prompt_embeds": (X, "embeddings have no tokens"),
    "prompt_logprob_start": (V, ""),
    "prompt_logprob_token_ids": (V, ""),
    "prompt_logprobs": (V, "of the client's own prompt; the cache is not read, all is computed and scored"),
    "query": (R, ""),
    "questions": (R, ""),
    "reasoning": (S, ""),
    "reasoning_effort": (S, ""),
    "regex": (S, "of structured outputs"),
    "repetition_detection": (S, "ends a reply: its verdict comes with the end"),
    "repetition_penalty": (S, ""),
    "request_id": (N, "the engine makes an id of its own from it, and ours are bound to that one"),
    "response_format": (S, ""),
    "return_mm_kwargs": (V, "of the client's own prompt"),
    "return_prompt_text": (V, "of the client's own prompt"),
    "return_token_ids": (V, "none of a reply that was blocked"),
    "return_token_offsets": (V, "of the client's own prompt"),
    "return_token_strs": (V, "of the client's own prompt"),
    "return_tokens_as_token_ids": (V, ""),
    "routed_experts_prompt_start": (N, "the setting that it needs is refused at the start"),
    "seed": (S, ""),
    "service_tier": (N, ""),
    "session_id": (N, "vLLM tells it to its KV events; sessions of the monitor have a header"),
    "skip_clone": (N, "only of raw sampling parameters, whose route is refused"),
    "skip_reading_prefix_cache": (N, "all is computed and scored"),
    "skip_special_tokens": (V, ""),
    "spaces_between_special_tokens": (V, ""),
    "state": (R, ""),
    "stop": (S, "found outside the engine: each step brings the verdict as if the reply ended there"),
    "stop_sequences": (S, "as `stop`"),
    "stop_token_ids": (S, ""),
    "store": (X, "the store of responses is refused at the start; without it vLLM does not keep the reply"),
    "stream": (V, ""),
    "stream_interval": (V, "tokens come together; each was released before"),
    "stream_options": (V, ""),
    "structural_tag": (S, "of structured outputs"),
    "structured_outputs": (S, ""),
    "suffix": (X, "vLLM does not serve it"),
    "system": (R, ""),
    "temperature": (S, ""),
    "text": (S, "the format of the reply"),
    "thinking": (S, ""),
    "thinking_token_budget": (S, ""),
    "token_ids": (R, "of a route that is refused"),
    "tokens": (N, "to be turned into text; the model is not asked"),
    "tool_choice": (S, ""),
    "tools": (R, ""),
    "top_k": (S, ""),
    "top_logprobs": (V, "none of a reply that was blocked"),
    "top_p": (S, ""),
    "trace_decode_token_ids": (S, "needs a setting of the server; each token that it makes the model say is scored"),
    "truncate_prompt_tokens": (R, "what is left is read; roles that do not fit it any more are unknown, as a user's"),
    "truncation": (R, "as `truncate_prompt_tokens`"),
    "truncation_side": (R, "as `truncate_prompt_tokens`"),
    "use_beam_search": (X, "asks for one token at a time, so that no stream rule would see a reply"),
    "user": (N, ""),
    "videos": (R, "of models that see; their rows are read like others"),
    "vllm_xargs": (X, "our own keys in it, but for steers that the policy lets a request ask for"),
    "watermarking": (S, ""),
    "whitespace_pattern": (S, "of structured outputs"),
}
"""By a field's name, wherever it stands: what it may do, and what else there is to say."""

NOT_SERVED: dict[str, str] = {
    "--enable-scale-out": "`/inference/v1/generate` takes raw sampling parameters, `/inference/v1/abort_requests` ends "
    "anybody's request",
    "--tokens-only": "as `--enable-scale-out`",
    "VLLM_ENABLE_RESPONSES_API_STORE": "whoever knows the id of a stored response reads it",
    "VLLM_SERVER_DEV_MODE": "development routes reach into workers",
}
"""Settings that open routes whose fields are not judged, and why the server does not start with them."""


def page() -> str:
    """docs/request-fields.md."""
    rows = "\n".join(
        f"| `{name}` | {judgement.value}{f': {why}' if why else ''} |"
        for name, (judgement, why) in sorted(JUDGED.items())
        if not name.startswith("_")
    )
    settings = "\n".join(f"| `{name}` | {why} |" for name, why in NOT_SERVED.items())
    return _PAGE.format(rows=rows, settings=settings)


_PAGE = """\
# What a client can ask for, and what that does to the monitor

Written by `.venv/bin/python -m tests.support.judged_fields`. Each field of each route of vLLM that takes a body was
looked at; `tests/engine/test_request_fields.py` fails when vLLM has one that does not stand here, and when this page is
not the one that the list gives. What is refused is answered with 400, `not_monitored` or `reserved_key`, before
anything runs, or by vLLM itself.

| field | what it does |
|---|---|
{rows}

Routes whose bodies are not judged stay closed: the server does not start with

| setting | why |
|---|---|
{settings}
"""


if __name__ == "__main__":
    from pathlib import Path

    (Path(__file__).parents[2] / "docs/request-fields.md").write_text(page())
