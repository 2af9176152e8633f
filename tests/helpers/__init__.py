"""What tests share: inputs, runs of the command, and slow, literal versions of the papers."""
