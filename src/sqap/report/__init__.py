"""What people look at: tables, and rollout videos that show which visual tokens a policy keeps."""
