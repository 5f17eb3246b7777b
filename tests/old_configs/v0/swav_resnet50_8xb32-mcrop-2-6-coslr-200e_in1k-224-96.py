_base_ = ['_base_/mocov2_views.py', '_base_/lars_200e.py', '_base_/runtime.py']

num_crops = [2, 6]
after = [
    dict(
        type='RandomAppliedTrans',
        transforms=[dict(type='ColorJitter', brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)],
        p=0.8),
    dict(type='RandomGrayscale', p=0.2),
    dict(type='GaussianBlur', sigma_min=0.1, sigma_max=2.0, p=0.5),
    dict(type='RandomHorizontalFlip'),
    dict(type='ToTensor'),
    dict(type='Normalize', **{{_base_.img_norm_cfg}}),
]
data = dict(
    train=dict(
        num_views=num_crops,
        pipelines=[
            [dict(type='RandomResizedCrop', size=224, scale=(0.14, 1.))] + after,
            [dict(type='RandomResizedCrop', size=96, scale=(0.05, 0.14))] + after,
        ]))
model = dict(
    type='SwAV',
    backbone=dict(
        type='ResNet', depth=50, in_channels=3, out_indices=[4], norm_cfg=dict(type='SyncBN'), zero_init_residual=True),
    neck=dict(type='SwAVNeck', in_channels=2048, hid_channels=2048, out_channels=128, with_avg_pool=True),
    head=dict(type='SwAVHead', feat_dim=128, epsilon=0.05, temperature=0.1, num_crops=num_crops))
custom_hooks = [
    dict(
        type='SwAVHook',
        priority='VERY_HIGH',
        batch_size={{_base_.data.samples_per_gpu}},
        epoch_queue_starts=15,
        crops_for_assign=[0, 1],
        feat_dim=128,
        queue_length=3840)
]
optimizer = dict(lr=0.6)
optimizer_config = dict(frozen_layers_cfg=dict(prototypes=5005))
lr_config = dict(_delete_=True, policy='CosineAnnealing', min_lr=6e-4, by_epoch=False)
checkpoint_config = dict(interval=10, max_keep_ckpts=3)
