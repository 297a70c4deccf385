"""`python -m d2o`, and so `torchrun -m d2o`: the same as the console script `d2o`."""

from d2o.cli.app import main

if __name__ == "__main__":
    main()
