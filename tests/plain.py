"""RaDis in plain PyTorch, a row at a time: generate.py and train.py must equal it.

`model` and `teacher` map tokens [1, T] to logits [1, T, V]. Prompt, reference, rationale and cue
are lists of token ids; an example is (prompt, reference, rationale), with EOS where it belongs.
"""

import torch
import torch.nn.functional as F

from generate import exponential_noise, noise_key  # equal key and count: equal noise


@torch.no_grad()
def write_rationale(model, prompt, reference, cue, eos_ids, max_new_tokens, temperature, seed, id):
    """Step 1: prefill the reference; the model's continuation is the rationale."""
    rationale = list(cue)
    key = torch.tensor([noise_key(seed, id)])
    for count in range(max_new_tokens):
        tokens = torch.tensor([prompt + reference + rationale])
        logits = model(tokens)[0, -1]  # [V]
        if temperature > 0:  # -log(noise) is Gumbel noise, with which the argmax is a sample
            noise = exponential_noise(key, torch.tensor([count]), len(logits))
            logits = logits / temperature - noise[0].log()
        token = logits.argmax().item()
        if token in eos_ids:
            return rationale, "eos"
        rationale.append(token)
    return rationale, "length"


def joint_loss(model, teacher, examples, weight):
    """Step 2: losses of references, plus `weight` times those of rationales, over all tokens."""
    total = 0.0
    count = 0
    for prompt, reference, rationale in examples:
        tokens = torch.tensor([prompt + reference + rationale])
        places = slice(len(prompt) - 1, -1)  # logits at t predict token t + 1
        log_probs = model(tokens)[0, places].log_softmax(-1)  # [y + r, V]
        answer = tokens[0, len(prompt) :]
        losses = F.nll_loss(log_probs, answer, reduction="none")
        y, r = losses.split([len(reference), len(rationale)])
        if teacher is not None:
            with torch.no_grad():
                target = teacher(tokens)[0, places].log_softmax(-1)
            # KL(teacher || model)
            kl = F.kl_div(log_probs, target, reduction="none", log_target=True)
            r = kl[len(reference) :]  # [r, V]
        total = total + y.sum() + weight * r.sum()
        count += len(answer)
    return total / count


def train_step(model, teacher, optimizer, examples, weight, max_grad_norm):
    loss = joint_loss(model, teacher, examples, weight)
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item(), norm.item()
