"""Ask a trained adapter questions.

python test.py --peft-path=outputs/.../peft_100 --question="What is the capital of France?"

Without --question it is a chat. The base model, its quantisation and the prompt template
come from the adapter's folder.
"""

import argparse
import sys

import utils


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Ask a trained adapter questions.",
        epilog="Without --question it is a chat over several turns; Ctrl-D ends it.",
    )
    parser.add_argument("--peft-path", required=True, help="an adapter: .../peft_100")
    parser.add_argument(
        "--question", action="append", default=[], help="may be given several times"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 (default) answers greedily"
    )
    parser.add_argument(
        "--base", action="store_true", help="print the base model's answer as well"
    )
    parser.add_argument(
        "--device", help="cpu, cuda, cuda:1, ... (default: the GPU, if any)"
    )
    options = parser.parse_args(arguments)
    if options.max_new_tokens < 1:
        parser.error("--max-new-tokens must be 1 or more")
    if not 0 <= options.temperature < float("inf"):
        parser.error("--temperature must be 0 or more")
    return options


def main() -> None:
    options = parse()
    utils.quiet()
    utils.offline_if_unreachable()
    # Imported here, so that --help and a mistyped option answer at once.
    import model

    try:
        device = model.chosen_device(options.device)
        about = model.read_about(options.peft_path)
        net, tokenizer = model.open_adapter(options.peft_path, about, device)
    except (utils.UserError, RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
    for question in options.question:
        print(f"Q: {question}")
        turn = {"instruction": question, "input": ""}
        ask(net, tokenizer, about["template"], [turn], options)
    if not options.question:
        chat(net, tokenizer, about["template"], options)


def ask(net, tokenizer, template: str, turns: list[dict], options) -> str:
    """Stream the answer to the last of `turns` to the terminal; return it."""
    from contextlib import nullcontext

    import torch
    from transformers import TextStreamer

    import dataset
    import examine
    import model

    ids = torch.tensor([dataset.prompt(template, turns, tokenizer)], device=net.device)
    ends = dataset.ends(template, tokenizer, net.generation_config)
    sampling = {"do_sample": False}
    if options.temperature:
        sampling = {"do_sample": True, "temperature": options.temperature}
    output = ids
    for name in ("base", "tuned") if options.base else ("tuned",):
        print(f"{name}: " if options.base else "A: ", end="", flush=True)
        adapter = net.disable_adapter() if name == "base" else nullcontext()
        with torch.no_grad(), model.autocast(net), adapter:
            output = net.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=options.max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=ends,
                streamer=TextStreamer(
                    tokenizer, skip_prompt=True, skip_special_tokens=True
                ),
                **sampling,
            )
    added = examine.before_end(output[0, ids.shape[1] :].tolist(), ends)
    return tokenizer.decode(added, skip_special_tokens=True).strip()


def chat(net, tokenizer, template: str, options) -> None:
    """Ask and answer until the end of the input; earlier turns stay in the prompt."""
    turns: list[dict] = []
    while True:
        try:
            question = input("Q: ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if question:
            turns.append({"instruction": question, "input": ""})
            turns[-1]["output"] = ask(net, tokenizer, template, turns, options)


if __name__ == "__main__":
    main()
