"""``python -m qc``, and what ``accelerate launch -m qc`` runs."""

from qc.cli import main

if __name__ == "__main__":
    main()
