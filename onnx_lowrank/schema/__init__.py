"""What runs found and did as frozen values: the schema of reports, which every package fills."""
