"""Every field of every request that vLLM takes was judged: could it weaken the monitor? A new one is noticed here."""

from __future__ import annotations

import pytest
from vllm.entrypoints.anthropic.protocol import AnthropicCountTokensRequest, AnthropicMessagesRequest
from vllm.entrypoints.generate.generative_scoring.serving import GenerativeScoringRequest
from vllm.entrypoints.generate.structured_decisions.protocol import StructuredDecisionRequest
from vllm.entrypoints.openai.chat_completion.protocol import BatchChatCompletionRequest, ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

SAMPLING = """
allowed_token_ids bad_words frequency_penalty length_penalty logit_bias min_p presence_penalty
repetition_detection repetition_penalty seed structured_outputs temperature thinking_token_budget top_k top_p
watermarking response_format text output_config
guided_decoding_backend early_stopping
"""
"""Choose other tokens: each is scored, whatever it is."""
LENGTH = """
ignore_eos max_completion_tokens max_output_tokens max_tokens min_tokens stop stop_sequences stop_token_ids
max_tool_calls
"""
"""End a reply sooner or later: what there is gets judged, and the next request reads what this one left."""
PROMPT = """
add_generation_prompt add_special_tokens continue_final_message documents input instructions messages
parallel_tool_calls prompt reasoning reasoning_effort suffix system thinking tool_choice tools
truncate_prompt_tokens truncation truncation_side previous_input_messages chat_template_kwargs media_io_kwargs
mm_processor_kwargs query items item_first label_token_ids state questions
"""
"""Say what the prompt is: it is read as the model reads it, token by token."""
SHOWN = """
echo enable_response_messages include include_reasoning include_stop_str_in_output
logprob_token_ids logprobs prompt_logprobs return_mm_kwargs return_prompt_text return_token_ids
return_token_offsets return_tokens_as_token_ids skip_special_tokens spaces_between_special_tokens stream
stream_interval stream_options top_logprobs routed_experts_prompt_start apply_softmax
"""
"""Say what is shown of what has left the hold-back, which nothing leaves unscored."""
ACCOUNT = """
background best_of cache_salt metadata model n previous_response_id prompt_cache_key request_id service_tier
session_id store user
"""
"""Names and accounts: ids are not trusted, the salt is a part of ours, choices are counted and judged one by one."""
REFUSED = "chat_template prompt_embeds use_beam_search vllm_xargs"
"""Refused, or looked through: templates by vLLM, embeddings and beam search by us, ``vllm_xargs`` for reserved keys."""
WITHOUT_EFFECT = "audio ec_transfer_params images kv_transfer_params mm_payload priority videos"
"""For connectors, with which no monitored server starts; for media; for schedules by priority, which are no default."""
JUDGED = {
    name: why
    for why, names in (
        ("sampling", SAMPLING),
        ("length", LENGTH),
        ("prompt", PROMPT),
        ("shown", SHOWN),
        ("account", ACCOUNT),
        ("refused", REFUSED),
        ("without effect", WITHOUT_EFFECT),
    )
    for name in names.split()
}
REQUESTS = (
    *(ChatCompletionRequest, BatchChatCompletionRequest, CompletionRequest, ResponsesRequest),
    *(AnthropicMessagesRequest, AnthropicCountTokensRequest, GenerativeScoringRequest),
    StructuredDecisionRequest,
)


@pytest.mark.parametrize("request_class", REQUESTS, ids=lambda request_class: request_class.__name__)
def test_every_field_was_judged(request_class: type) -> None:
    fields = set(request_class.model_fields)  # type: ignore[attr-defined]
    assert len(fields) > 3
    assert sorted(fields - set(JUDGED)) == []


def test_nothing_is_judged_that_is_not_there() -> None:
    fields = {name for request_class in REQUESTS for name in request_class.model_fields}  # type: ignore[attr-defined]
    assert sorted(set(JUDGED) - fields) == []
