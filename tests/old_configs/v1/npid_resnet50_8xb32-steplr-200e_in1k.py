_base_ = ['_base_/views.py', '_base_/steps_200e.py', '_base_/runtime.py']

train_pipeline = [
    {{_base_.load}},
    dict(type='RandomResizedCrop', size=224, scale=(0.2, 1.), backend='pillow'),
    {{_base_.gray}},
    dict(type='ColorJitter', brightness=0.4, contrast=0.4, saturation=0.4, hue=0.4),
    {{_base_.flip}},
    dict(type='PackSelfSupInputs', algorithm_keys=['sample_idx'], meta_keys=['img_path']),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
model = dict(
    type='NPID',
    neg_num=65536,
    data_preprocessor={{_base_.data_preprocessor}},
    backbone=dict(type='ResNet', depth=50, in_channels=3, out_indices=[4], norm_cfg=dict(type='SyncBN')),
    neck=dict(type='LinearNeck', in_channels=2048, out_channels=128, with_avg_pool=True),
    head=dict(type='ContrastiveHead', loss=dict(type='mmcls.CrossEntropyLoss'), temperature=0.07),
    memory_bank=dict(type='SimpleMemory', length=1281167, feat_dim=128, momentum=0.5))
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=50), checkpoint=dict(type='CheckpointHook', interval=10, max_keep_ckpts=3))
