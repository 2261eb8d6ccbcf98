"""Examples at the end of every command's help, and on its page; a test gives each of them to the command's parser."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[str, ...]] = {
    "run": (
        "regraft run quickstart",
        "regraft run prune-recover model=MODEL prune.ratio=0.3 --output runs/mine",
        "regraft run recipe.yaml --dry-run",
        "regraft run recipe.yaml --resume",
    ),
    "prune": (
        "regraft prune seedling --ratio 0.25 --output pruned",
        "regraft prune MODEL --calibration text.txt --shape per-layer -o pruned",
        "regraft prune MODEL --targets heads,ffn,layers --dry-run",
        "regraft prune MODEL --memory 4GB --output pruned",
    ),
    "compress": (
        "regraft compress seedling --ratio 0.2 --output thin",
        "regraft compress MODEL --method svd_llm --calibration text.txt --dry-run",
    ),
    "recover": (
        "regraft recover pruned --steps 500 --output small",
        "regraft recover pruned --data instructions.jsonl --lr auto --output small",
        "regraft recover pruned --adapter deep_lora --no-merge --output adapter",
        "regraft recover pruned --ranks plan.json --output small --resume",
    ),
    "evaluate": (
        "regraft evaluate small",
        "regraft evaluate small --text held_out.txt --speed --json figures.json",
        "regraft evaluate small --tasks continuation --against seedling --limit 200",
        "regraft evaluate small --tasks boolq,piqa,arc_easy --limit 500",
    ),
    "generate": (
        "regraft generate seedling --prompt 'Return the' --tokens 48",
        "regraft generate small --prompt - --temperature 0.7",
    ),
    "chat": ("regraft chat small", "regraft chat small --system 'Answer in one sentence.'"),
    "export": (
        "regraft export small --to gguf --quantize Q4_K_M --output phone",
        "regraft export adapter --to peft-lora --output lora",
        "regraft export pruned --to hf-uniform --output padded",
    ),
    "allocate": (
        "regraft allocate pruned --budget r=8 --output plan.json",
        "regraft allocate pruned --method gradient --budget r=8 --output plan.json",
        "regraft allocate pruned --budget r=8 --workers 2 --output plan.json --resume",
    ),
    "meta": ("regraft meta train searches --output prior",),
    "inspect": ("regraft inspect seedling", "regraft inspect MODEL --json"),
    "complete": (
        "regraft complete ratings.csv --rank 10 --output done",
        "regraft complete ratings.csv --pairs wanted.csv --output done",
    ),
    "init": ("regraft init quickstart", "regraft init prune-recover --output mine.yaml"),
    "schema": ("regraft schema --output recipe.schema.json",),
    "advise": (
        "regraft advise MODEL --size 500MB",
        "regraft advise MODEL --memory 4GB",
        "regraft advise MODEL --speed 1.3x",
    ),
    "report": ("regraft report runs/quickstart --open", "regraft report pruned --output page.html"),
    "runs": ("regraft runs", "regraft runs runs --compare quickstart,mine", "regraft runs --remove mine --yes"),
    "studio": ("regraft studio", "regraft studio results --port 0 --open"),
    "doctor": ("regraft doctor", "regraft doctor --json"),
}


def epilog(name: str) -> str:
    """Returns the end of the help of a command: its examples, a line each."""
    return "\n".join(["Examples:", *(f"  {line}" for line in EXAMPLES[name])])
