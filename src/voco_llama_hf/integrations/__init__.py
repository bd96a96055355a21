"""The engines of the field, each a file or a folder that nothing else imports."""
