"""What a person looks at: rollout videos that show which visual tokens a policy keeps."""
