"""The demonstrations, on the digits of scikit-learn."""
