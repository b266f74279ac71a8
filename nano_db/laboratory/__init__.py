"""What was measured: experiments and their tables, pictures, benchmarks, controls. It imports the other two rooms."""
