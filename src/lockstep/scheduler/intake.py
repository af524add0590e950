"""From a request to its sequences, or the reason why it can never run."""

from __future__ import annotations

from dataclasses import replace

from lockstep.core.errors import InvalidRequest
from lockstep.core.request import Request
from lockstep.core.sampling import SamplingParams
from lockstep.scheduler.limits import SchedulerLimits
from lockstep.scheduler.sequence import RequestGroup, Sequence

_SEED_MODULUS = 2**64


def validate(request: Request, limits: SchedulerLimits) -> None:
    """Raises InvalidRequest when the request could not finish even with the whole engine to itself."""
    num_prompt = len(request.prompt_token_ids)
    embeds = request.pooling is not None
    if num_prompt == 0:
        raise InvalidRequest("the prompt is empty; it needs at least one token", param="prompt")
    longest = limits.context_length if embeds else limits.context_length - 1
    if num_prompt > longest:
        raise InvalidRequest(
            f"the prompt has {num_prompt} tokens, but the context length of {limits.context_length} leaves "
            f"room for {longest}; shorten the prompt",
            param="prompt",
            code="context_length_exceeded",
        )
    if num_prompt > limits.pool_tokens:
        raise InvalidRequest(
            f"the prompt has {num_prompt} tokens, but the KV pool holds {limits.pool_tokens}; shorten the "
            "prompt or give the engine more KV memory",
            param="prompt",
            code="context_length_exceeded",
        )
    max_tokens, room = request.params.max_tokens, limits.max_sequence_tokens - num_prompt
    if max_tokens is not None and max_tokens > room and not embeds:
        held_by = (
            f"the context length is {limits.context_length}"
            if limits.context_length <= limits.pool_tokens
            else f"the KV pool holds {limits.pool_tokens}"
        )
        raise InvalidRequest(
            f"max_tokens {max_tokens} does not fit beside the prompt's {num_prompt} tokens: {held_by}; ask for "
            f"at most {room}",
            param="max_tokens",
            code="context_length_exceeded",
        )
    if embeds and request.params.n > 1:
        raise InvalidRequest(f"an embedding has one result, so n must be 1, not {request.params.n}", param="n")


def expand(request: Request, first_seq_id: int, limits: SchedulerLimits) -> RequestGroup:
    """The `params.n` sequences of a valid request; all but the first are held."""
    params = request.params
    # A prompt to embed may fill the context. The token after it never comes and needs no room.
    room = max(1, limits.max_sequence_tokens - len(request.prompt_token_ids))
    eos = () if params.ignore_eos else limits.eos_token_ids
    stop_token_ids = frozenset(eos).union(params.stop_token_ids)
    group = RequestGroup(request)
    for index in range(params.n):
        group.unfinished[index] = Sequence(
            first_seq_id + index,
            group,
            index,
            _params_of(params, index),
            priority=request.priority if limits.policy == "priority" else 0,
            max_new_tokens=room if params.max_tokens is None else params.max_tokens,
            stop_token_ids=stop_token_ids,
        )
    group.held = list(group.unfinished.values())[1:]
    return group


def _params_of(params: SamplingParams, index: int) -> SamplingParams:
    """Each choice has its own seed; prompt log-probabilities are the same for all, so one computes them."""
    if index == 0:
        return params
    seed = None if params.seed is None else (params.seed + index) % _SEED_MODULUS
    return replace(params, seed=seed, prompt_logprobs=None)
