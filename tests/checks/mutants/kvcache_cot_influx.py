"""Plausible but wrong pruners that the checks of CoT-Influx must reject."""

import torch
import torch.nn.functional as F

from refimpl.kvcache.prompt.cot_influx import Actions, fill, prune, reward, sample_actions


def keep_everything(pruner, features, mask, samples, generator):
    shot = pruner.shot_logits(features, mask)
    shots = torch.ones(samples, *shot.shape, dtype=torch.bool)
    return Actions(shots, mask & shots[..., None], F.logsigmoid(shot).sum(-1).expand(samples, -1))


def stage_two_sees_dropped_shots(pruner, features, mask, samples, generator):
    actions = sample_actions(pruner, features, mask, samples, generator)
    token = pruner.token_logits(features)
    log = F.logsigmoid(torch.where(actions.tokens, token, -token))
    dropped = mask & ~actions.shots[..., None]
    return actions._replace(log_prob=actions.log_prob + log.masked_fill(~dropped, 0).sum((-2, -1)))


def padding_acts(pruner, features, mask, samples, generator):
    actions = sample_actions(pruner, features, mask, samples, generator)
    log = F.logsigmoid(-pruner.token_logits(features)) * (~mask)
    return actions._replace(log_prob=actions.log_prob + (log * actions.shots[..., None]).sum((-2, -1)))


def tokens_of_dropped_shots_stay(pruner, features, mask, samples, generator):
    actions = sample_actions(pruner, features, mask, samples, generator)
    return actions._replace(tokens=actions.tokens | (mask & ~actions.shots[..., None]))


def shots_alone_are_credited(pruner, features, mask, samples, generator):
    actions = sample_actions(pruner, features, mask, samples, generator)
    shot = pruner.shot_logits(features, mask)
    log = F.logsigmoid(torch.where(actions.shots, shot, -shot)).sum(-1)
    return actions._replace(log_prob=log + 0 * pruner.token_logits(features).sum())


def length_is_free(loss, correct, tokens, limit):
    return reward(loss, correct, torch.full_like(tokens, limit) + 0 * tokens, limit) * (tokens > 0)


def longer_is_always_better(loss, correct, tokens, limit):
    return reward(loss, correct, tokens, limit) * torch.where(tokens > limit, (tokens / limit) ** 2, 1.0)


def shorter_is_always_better(loss, correct, tokens, limit):
    return reward(loss, correct, tokens, limit) * torch.where(tokens < limit, (limit / tokens) ** 2, 1.0)


def budget_is_ignored(pruner, features, mask, budget):
    return prune(pruner, features, mask, torch.full_like(budget, 10**6))


def every_token_of_a_kept_shot(pruner, features, mask, budget):
    shot = pruner.shot_logits(features, mask)
    return mask & fill(shot.masked_fill(shot <= 0, -torch.inf), mask.sum(-1), budget)[..., None]


def first_come_first_served(pruner, features, mask, budget):
    shot, tokens = pruner.shot_logits(features, mask), (pruner.token_logits(features) > 0) & mask
    order = -torch.arange(shot.shape[1]).float().expand_as(shot)
    return tokens & fill(order.masked_fill(shot <= 0, -torch.inf), tokens.sum(-1), budget)[..., None]


def no_stage_one(pruner, features, mask, budget):
    tokens = (pruner.token_logits(features) > 0) & mask
    return tokens & fill(pruner.shot_logits(features, mask), tokens.sum(-1), budget)[..., None]


MUTANTS = [
    ("cot_influx", "nothing is pruned", keep_everything),
    ("cot_influx", "stage 2 sees dropped shots", stage_two_sees_dropped_shots),
    ("cot_influx", "padding has actions", padding_acts),
    ("cot_influx", "tokens of dropped shots stay", tokens_of_dropped_shots_stay),
    ("cot_influx", "only stage 1 is credited", shots_alone_are_credited),
    ("cot_influx_reward", "the prompt's length does not count", length_is_free),
    ("cot_influx_reward", "w = 1 above the limit, too", longer_is_always_better),
    ("cot_influx_reward", "w = -1 below the limit, too", shorter_is_always_better),
    ("cot_influx_prune", "the budget is ignored", budget_is_ignored),
    ("cot_influx_prune", "stage 2 is switched off", every_token_of_a_kept_shot),
    ("cot_influx_prune", "kept shots enter in order, not by probability", first_come_first_served),
    ("cot_influx_prune", "stage 1 is switched off", no_stage_one),
]
