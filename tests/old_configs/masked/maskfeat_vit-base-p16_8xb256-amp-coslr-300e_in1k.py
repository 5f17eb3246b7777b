_base_ = 'v1.py'

crop = _base_.crop
crop.scale = (0.5, 1.0)
masking = dict(
    type='BEiTMaskGenerator', input_size=14, num_masking_patches=78, min_num_patches=15, max_num_patches=None)
model = dict(
    type='MaskFeat', data_preprocessor=_base_.numbers,
    backbone=dict(type='MaskFeatViT', arch='b', patch_size=16, drop_path_rate=0),
    neck=dict(
        type='LinearNeck', in_channels=768, out_channels=108, with_avg_pool=False,
        init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02, bias=0)),
    head=dict(type='MIMHead', loss=dict(type='PixelReconstructionLoss', criterion='L2')),
    target_generator=dict(type='HOGGenerator', nbins=9, pool=8, gaussian_window=16))
train_dataloader = dict(batch_size=256, dataset=dict(pipeline=[_base_.load, crop, _base_.flip, masking, _base_.pack]))
optim_wrapper = dict(
    optimizer=dict(type='AdamW', lr=2e-4 * 8, betas=(0.9, 0.999), weight_decay=0.05), clip_grad=dict(max_norm=0.02))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=True, begin=0, end=30, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', T_max=270, by_epoch=True, begin=30, end=300, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=300)
