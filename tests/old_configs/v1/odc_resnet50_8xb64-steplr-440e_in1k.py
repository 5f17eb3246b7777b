_base_ = 'deepcluster_resnet50_8xb64-steplr-200e_in1k.py'

train_dataloader = dict(sampler=dict(type='DeepClusterSampler', shuffle=True, replace=True))
model = dict(
    type='ODC',
    backbone=dict(norm_cfg=dict(type='SyncBN')),
    neck=dict(type='ODCNeck', in_channels=2048, hid_channels=512, out_channels=256, with_avg_pool=True),
    head=dict(in_channels=256),
    memory_bank=dict(
        type='ODCMemory', length=1281167, feat_dim=256, momentum=0.5, num_classes=_base_.num_classes, min_cluster=20,
        debug=False))
first_clusters = _base_.custom_hooks[0]
first_clusters.clustering.pca_dim = -1
custom_hooks = [
    dict(first_clusters, unif_sampling=False, reweight=True, init_memory=True, interval=9999999999),
    dict(
        type='ODCHook',
        centroids_update_interval=10,
        deal_with_small_clusters_interval=1,
        evaluate_interval=50,
        reweight=True,
        reweight_pow=0.5),
]
optim_wrapper = dict(optimizer=dict(lr=0.06))
param_scheduler = [dict(type='MultiStepLR', by_epoch=True, milestones=[400], gamma=0.4)]
train_cfg = dict(max_epochs=440)
