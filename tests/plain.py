"""RaDis in plain PyTorch, a row at a time: what generate.py and train.py must equal.

    write_rationale(model, prompt, reference, cue, eos_ids, max_new_tokens, temperature, seed, id)
        -> (rationale, "eos" or "length")
    train_step(model, teacher, optimizer, examples, weight, max_grad_norm) -> (loss, gradient norm)

model(tokens [1, T]) -> logits [1, T, V]; so does `teacher`, or it is None. Prompt, reference,
rationale and cue are lists of token ids; an example is (prompt, reference, rationale) with EOS.
"""

import torch
import torch.nn.functional as F

from generate import exponential_noise, noise_key


@torch.no_grad()
def write_rationale(model, prompt, reference, cue, eos_ids, max_new_tokens, temperature, seed, id):
    """Step 1: prefill the reference; the continuation is the rationale."""
    rationale = list(cue)
    for count in range(max_new_tokens):
        logits = model(torch.tensor([prompt + reference + rationale]))[0, -1]  # [V]
        if temperature > 0:  # the argmax of logits and Gumbel noise is a sample
            key = torch.tensor([noise_key(seed, id)])
            noise = exponential_noise(key, torch.tensor([count]), len(logits))[0]
            logits = logits / temperature - noise.log()
        token = logits.argmax().item()
        if token in eos_ids:
            return rationale, "eos"
        rationale.append(token)
    return rationale, "length"


def joint_loss(model, teacher, examples, weight):
    """Step 2: the losses of references, and `weight` times those of rationales, over all tokens."""
    total = 0.0
    count = 0
    for prompt, reference, rationale in examples:
        tokens = torch.tensor([prompt + reference + rationale])
        answer = slice(len(prompt) - 1, -1)  # logits at t predict token t + 1
        log_probs = model(tokens)[0, answer].log_softmax(-1)  # [y + r, V]
        losses = F.nll_loss(log_probs, tokens[0, len(prompt) :], reduction="none")
        y, r = losses.split([len(reference), len(rationale)])
        if teacher is not None:
            with torch.no_grad():
                target = teacher(tokens)[0, answer].log_softmax(-1)
            r = F.kl_div(log_probs, target, reduction="none", log_target=True)[len(y) :]
        total = total + y.sum() + weight * r.sum()
        count += len(losses)
    return total / count


def train_step(model, teacher, optimizer, examples, weight, max_grad_norm):
    loss = joint_loss(model, teacher, examples, weight)
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item(), norm.item()
