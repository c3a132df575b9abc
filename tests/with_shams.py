"""`python -m tests.with_shams COMMAND WORDS`: a command of ours in a process that knows the sham sampler and the painter."""

from launch.cli import main
from tests.runs import painter
from tests.shams import Drawing, registered

if __name__ == "__main__":
    with registered(Drawing), painter():
        main()
