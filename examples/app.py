"""Open a page on which checkpoints are tried in a browser.

    pip install -e ".[app]" -c constraints.txt
    python examples/app.py                                                    # the bundled generators
    python examples/app.py --model_name_or_path brain-t1 outputs/ppo_finetune --server_port 8000

Generate volumes and turn them, start from a scan of yours, compare two checkpoints from the same noise, score a scan,
download NIfTI files. Nothing is fetched from the internet, except a model of the Hub that is asked for. The page is
for this machine only; with another --server_name, who can reach it can use the checkpoints that are listed here, but
not type in others. Uploads are deleted once they are read, volumes when their page is closed.
"""

from dataclasses import dataclass, field

from diffusers_med3d.app.work import bundled_generators, load_rewards
from diffusers_med3d.rewards.loading import DEFAULT_REWARDS
from diffusers_med3d.utils.arguments import ScriptParser, refused_in_one_line


@dataclass
class AppArguments:
    """What the page offers, and where it is served."""

    model_name_or_path: list[str] = field(
        default_factory=bundled_generators,
        metadata={
            "help": "Generators to choose from: bundled names, folders or Hub ids; the page opens with the first."
        },
    )
    reward_funcs: list[str] = field(
        default_factory=lambda: list(DEFAULT_REWARDS),
        metadata={
            "help": "What volumes are scored with: bundled names, folders or Hub ids of reward models, "
            "file.py:function or package.module:function."
        },
    )
    server_name: str = field(
        default="127.0.0.1", metadata={"help": "Address to serve at; 0.0.0.0 lets other machines in."}
    )
    server_port: int = field(default=7860, metadata={"help": "Port to serve at; 0 takes any that is free."})
    max_queue: int = field(default=100, metadata={"help": "Requests that may wait; more are refused."})


def main() -> None:
    """Load the first generator and the rewards, serve the page."""
    (args,) = ScriptParser(AppArguments, description=__doc__).parse()
    with refused_in_one_line():
        try:
            from diffusers_med3d.app.server import serve
        except ModuleNotFoundError as error:
            raise ImportError(f'{error}; the page needs: pip install -e ".[app]" -c constraints.txt') from error
        rewards = load_rewards(args.reward_funcs)
        serve(args.model_name_or_path, rewards, args.server_name, args.server_port, args.max_queue)


if __name__ == "__main__":
    main()
